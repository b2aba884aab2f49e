"""Benchmark items from a user's files: JSON lines (.jsonl, .jsonl.gz), Parquet, or a data set on the hub.

One object an item: `id`, `question` and/or `context`, and either `choices` (a list of texts) with `answer` (an index
from 0) or `target` (a text); `subject` where there is one. Items are checked as they are read, for a wrong index or a
missing field otherwise shows as a model that guesses.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError

__all__ = ["Item", "find", "read_items"]

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_TEXTS = ("question", "context", "target", "subject")


@dataclass(frozen=True, slots=True)
class Item:
    """One item; `hash` is a sha256 over all its fields, so that records can name it without telling it."""

    id: str
    question: str = ""
    context: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1
    target: str = ""
    subject: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    hash: str = ""


def find(data: Path, name: str) -> Path | None:
    """The file of a data folder that has this name before its suffix."""
    for suffix in _SUFFIXES:
        if (file := data / (name + suffix)).is_file():
            return file
    return None


def read_items(source: str | Path, *, choices: bool) -> list[Item]:
    """All items of a file, or of `hub:OWNER/NAME[/CONFIG]:SPLIT`.

    Args:
        choices: whether the items must have choices and an answer; else they must have a target.

    Raises `DataError` naming the line and the field.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for where, row in _rows(str(source)):
        item = _item(row, where, choices)
        if item.id in seen:
            raise DataError(f"{where}: the id {item.id!r} occurs twice; give every item its own")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise DataError(f"{source}: holds no items")
    return items


def _item(row: Any, where: str, choices: bool) -> Item:
    if not isinstance(row, dict):
        raise DataError(f"{where}: no JSON object; one item a line is expected")
    for name in _TEXTS:
        if not isinstance(row.get(name, ""), str):
            raise DataError(f"{where}: {name!r} holds {type(row[name]).__name__}, not text")
    if "id" not in row or not str(row["id"]):
        raise DataError(f"{where}: has no id")
    found = list(row.get("choices") or ())
    if choices:
        if len(found) < 2 or not all(isinstance(c, str) and c for c in found):
            raise DataError(f"{where}: 'choices' must be a list of two or more texts")
        answer = row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(found):
            raise DataError(f"{where}: 'answer' is {answer!r}, not an index of its {len(found)} choices, from 0")
    elif not row.get("target"):
        raise DataError(f"{where}: has no target")
    if not row.get("question") and not row.get("context"):
        raise DataError(f"{where}: has neither question nor context")
    known = {"id", "choices", "answer", *_TEXTS}
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace"))
    return Item(str(row["id"]), row.get("question", ""), row.get("context", ""), tuple(found),
                row["answer"] if choices else -1, row.get("target", ""), row.get("subject", ""),
                {k: v for k, v in row.items() if k not in known}, digest.hexdigest()[:32])


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row."""
    if source.startswith("hub:"):
        yield from _hub_rows(source)
    elif source.endswith(".parquet"):
        yield from _parquet_rows(source)
    else:
        try:
            with (gzip.open(source, "rb") if source.endswith(".gz") else Path(source).open("rb")) as stream:
                for number, line in enumerate(stream, 1):
                    if not line.strip():
                        continue
                    try:
                        yield f"{source}: line {number}", json.loads(line)
                    except ValueError as error:
                        raise DataError(f"{source}: line {number} is not JSON ({error}); one object a line is "
                                        "expected") from None
        except FileNotFoundError:
            raise DataError(f"{source}: no such file") from None
        except (EOFError, OSError) as error:
            raise DataError(f"{source}: damaged or cannot be read ({error}); fetch it again") from None


def _parquet_rows(source: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(source).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source}: damaged or no Parquet file ({str(error).splitlines()[0][:160]})") from None
    for number, row in enumerate(rows):
        yield f"{source}: row {number}", {k: v for k, v in row.items() if v is not None}


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading from the hub needs the library `datasets`; pip install datasets, or give "
                        "--data a folder with the file") from None
    name, _, split = source.removeprefix("hub:").partition(":")
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    try:
        rows = datasets.load_dataset(f"{owner}/{repository}", config or None, split=split or "test")
    except Exception as error:  # whatever the library and the network raise
        raise DataError(f"{source}: cannot be loaded ({str(error).splitlines()[0][:200] if str(error) else error!r})") \
            from None
    for number, row in enumerate(rows):
        yield f"{source}: row {number}", {"id": str(number), **{k: v for k, v in row.items() if v is not None}}
