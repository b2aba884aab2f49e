"""Running a task: block by block, each written to disk when it is done, so that an interrupted run goes on.

    OUT/TASK/run.json        what is being run: task, items, model, settings, versions
    OUT/TASK/records.jsonl   a line for each item, in order
    OUT/TASK/outputs.jsonl   of tasks that generate: what the model wrote
    OUT/TASK/results.json    the figures, when all is done

A run that finds records of the same task, items, model and settings goes on after the last whole block; of another one
it refuses, and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.atomic import write_file
from hybridlm.errors import DataError
from hybridlm.evals.cases import Block, Case
from hybridlm.evals.results import Record, choice_record, summary
from hybridlm.evals.scorer import Scorer

__all__ = ["Plan", "Result", "run", "score_choices"]

VERSION = 1  # of prompts, scoring and records; raise it when one changes

# (scorer, cases of a block, shared tokens) -> a record of each, and what the model wrote where the task generates
Score = Callable[[Scorer, list[Any], int], tuple[list[Record], list[dict[str, Any]]]]


@dataclass(slots=True)
class Plan:
    """A task ready to run. `settings` is all that figures depend on besides items and model."""

    label: str
    blocks: list[Block]
    score: Score
    figures: tuple[str, ...] = ()  # those worth telling; () is all
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def items(self) -> int:
        return sum(len(block.ids) for block in self.blocks)

    @property
    def hash(self) -> str:
        """sha256 over the items and the settings: equal hashes mean comparable figures."""
        digest = hashlib.sha256(json.dumps([VERSION, self.label, self.settings], sort_keys=True).encode())
        for block in self.blocks:
            digest.update(json.dumps(block.ids).encode())
        return digest.hexdigest()


@dataclass(slots=True)
class Result:
    """What `results.json` holds."""

    task: str
    items: int
    figures: dict[str, dict[str, float | None]]
    labels: dict[str, dict[str, dict[str, float | None]]]  # the same by subject, where there are several
    meta: dict[str, Any]
    seconds: float  # of this process; what an earlier one did is not in it
    resumed: int  # items that an earlier process did
    records: list[Record] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "items": self.items, "figures": self.figures, "labels": self.labels,
                "seconds": self.seconds, "resumed_items": self.resumed, **self.meta}


def score_choices(scorer: Scorer, cases: list[Case], prefix: int) -> tuple[list[Record], list[dict[str, Any]]]:
    """Log-likelihoods of all choices. Items that were cut no longer begin like the others and go by themselves."""
    found: dict[int, list[tuple[float, bool]]] = {}
    for cut in (False, True):
        mine = [i for i, case in enumerate(cases) if case.truncated == cut]
        if not mine:
            continue
        flat = iter(scorer.continuations([r for i in mine for r in cases[i].requests], 0 if cut else prefix))
        found |= {i: [next(flat) for _ in cases[i].requests] for i in mine}
    return [choice_record(case, found[i]) for i, case in enumerate(cases)], []


def run(plan: Plan, scorer: Scorer, *, model: dict[str, Any], out: Path | None = None,
        progress: Callable[[int, int], None] | None = None) -> Result:
    """Run a task, or what is left of it.

    Args:
        model: what says which model this is: at least "name" and "fingerprint".
        out: folder for the records; None keeps them in memory.
        progress: called with items done and items in all.

    Raises `DataError` where `out` has records of another run.
    """
    began = time.perf_counter()
    meta = {"task_hash": plan.hash, "settings": plan.settings, "model": model, "versions": _versions()}
    store = _Store(out / plan.label.replace(":", "_"), plan, meta) if out else None
    records = store.records if store else []
    resumed = len(records)
    done = 0
    for block in plan.blocks:
        done += len(block.ids)
        if done <= resumed:
            continue
        fresh, outputs = plan.score(scorer, block.make(), block.prefix)
        if store:
            store.append(fresh, outputs)
        records += fresh
        if progress:
            progress(done, plan.items)
    labels = dict.fromkeys(r["label"] for r in records if r["label"])
    by_label = {label: _figures(plan, [r for r in records if r["label"] == label]) for label in labels} \
        if len(labels) > 1 else {}
    result = Result(plan.label, len(records), _figures(plan, records), by_label, meta, time.perf_counter() - began,
                    resumed, records)
    if store and (resumed < len(records) or not (store.folder / "results.json").exists()):
        write_file(store.folder / "results.json", (json.dumps(result.to_dict(), indent=1) + "\n").encode())
    return result


def _figures(plan: Plan, records: list[Record]) -> dict[str, dict[str, float | None]]:
    found = summary(records)
    return {name: found[name] for name in plan.figures or found}


class _Store:
    """The folder of one task's run."""

    def __init__(self, folder: Path, plan: Plan, meta: dict[str, Any]) -> None:
        self.folder = folder
        self._records, self._outputs = folder / "records.jsonl", folder / "outputs.jsonl"
        header = folder / "run.json"
        if header.exists():
            self._check(json.loads(header.read_text(encoding="utf-8")), meta)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(header, (json.dumps(meta, indent=1) + "\n").encode())
        ids = [[id for id, _ in block.ids] for block in plan.blocks]
        lines = _lines(self._records)
        whole = 0
        for block in ids:
            if [r.get("id") for _, r in lines[whole:whole + len(block)]] != block:
                break
            whole += len(block)
        self.records = [r for _, r in lines[:whole]]
        _keep(self._records, [line for line, _ in lines[:whole]])
        kept = {r["id"] for r in self.records}
        _keep(self._outputs, [line for line, r in _lines(self._outputs) if r.get("id") in kept])

    def _check(self, found: dict[str, Any], meta: dict[str, Any]) -> None:
        for name, what in (("task_hash", "of other items or settings"), ("model", "of another model")):
            if found.get(name) != json.loads(json.dumps(meta[name])):
                raise DataError(f"{self.folder}: holds a run {what}; give another --out, or remove the folder")

    def append(self, records: Sequence[Record], outputs: Sequence[dict[str, Any]]) -> None:
        """Outputs first: a record says that all of its item is there."""
        for file, rows in ((self._outputs, outputs), (self._records, records)):
            if rows:
                with file.open("ab") as stream:
                    stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                    stream.flush()


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file up to the first that is damaged."""
    found: list[tuple[bytes, dict[str, Any]]] = []
    if file.exists():
        for line in file.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not line.endswith(b"\n"):
                break
            found.append((line, row))
    return found


def _keep(file: Path, lines: list[bytes]) -> None:
    """Leave only these lines, which the file begins with or holds."""
    data = b"".join(lines)
    if file.exists() and file.read_bytes() != data:
        write_file(file, data)


def _versions() -> dict[str, str]:
    from hybridlm import __version__

    return {"hybridlm": __version__, "evals": str(VERSION), "numpy": np.__version__,
            "python": platform.python_version()}
