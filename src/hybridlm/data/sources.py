"""Where text comes from: a file, a folder or a glob of plain text, JSON lines and Parquet, as one ordered stream.

Files come in the order of their names, documents in the order of the file, so a source is the same stream each time.
JSON lines and Parquet hold one document a row, in the field `text`; a field `domain`, where there is one, labels it.
Plain text is one document a file; a large file is cut at the ends of paragraphs into pieces that are documents.
Hidden and binary files are left out and counted. `.gz` and `.zst` are read through.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

from hybridlm.errors import DataError

__all__ = ["Document", "Source"]

_SNIFF = 1 << 13
_BLOCK = 1 << 20  # bytes of plain text read at a time
_LARGE = 1 << 20  # a plain text file above this many bytes is cut into pieces
_PIECE = 1 << 16  # their length, in characters
_LEAST_PIECE, _PIECES = 1 << 12, 64  # a lone text file gives about so many pieces, so that some can be held out


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the label it is reported under ("" when it has none)."""

    text: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """The files behind a path, found once; read with `documents()`."""

    path: str
    files: tuple[Path, ...]
    text_field: str = "text"
    label_field: str = "domain"
    whole: bool = False
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def open(cls, path: str | Path, *, text_field: str = "text", label_field: str = "domain",
             without: tuple[Path, ...] = (), whole: bool = False) -> Source:
        """Find the files of a file, a folder (searched to its depths) or a glob pattern, less those in `without`.

        With `whole` a plain text file is one document however large it is.

        Raises `DataError` when there is nothing to read.
        """
        if str(path).startswith("hub:"):
            from hybridlm.data.hub import HubSource

            return HubSource(str(path), (), text_field, label_field, whole)
        root, skipped = Path(path), Counter[str]()
        if root.is_dir():
            found = list(_walk(root, skipped))
        elif has_magic(str(path)) and not root.exists():
            found = sorted(f for f in map(Path, glob(str(path), recursive=True)) if f.is_file())  # noqa: PTH207
        else:
            found = [root]
        left_out = {f.resolve() for f in without}
        files = [f for f in found if f.resolve() not in left_out]
        alone = len(files) == 1 and files[0] == root
        if alone:
            try:
                if _is_binary(root):
                    raise DataError(f"{root}: not UTF-8 text; give text, .jsonl(.gz, .zst) or .parquet")
            except OSError as error:
                raise DataError(f"{root}: cannot be read ({error.strerror}); give a file or folder of text") from None
        else:
            files = [f for f in files if not _refused(f, skipped)]
        if not files:
            told = "".join(f"; {n} {why}" for why, n in sorted(skipped.items()))
            raise DataError(f"{path}: no text files found{told}")
        return cls(str(path), tuple(files), text_field, label_field, whole, skipped)

    @property
    def nbytes(self) -> int:
        """Bytes of the files as they lie on disk."""
        return sum(f.stat().st_size for f in self.files)

    @property
    def fingerprint(self) -> str:
        """sha256 over names, sizes, times of change and samples of the content: equal means nothing was edited."""
        digest = hashlib.sha256(f"{self.text_field} {self.label_field}".encode())
        base = os.path.commonpath([f.parent for f in self.files])
        for file in self.files:
            stat = file.stat()
            digest.update(f"{os.path.relpath(file, base)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            with file.open("rb") as stream:
                for at in (0, stat.st_size // 2, max(0, stat.st_size - _SNIFF)):
                    stream.seek(at)
                    digest.update(stream.read(_SNIFF))
        return digest.hexdigest()

    def documents(self, file: int = 0, skip: int = 0) -> Iterator[tuple[int, int, Document]]:
        """(file number, document number within it, document), from document `skip` of file `file` on; none is empty."""
        for i in range(file, len(self.files)):
            reader = _reader(self.files[i])
            for j, document in enumerate(reader(self, self.files[i])):
                if (i > file or j >= skip) and document.text:
                    yield i, j, document


# -- finding -----------------------------------------------------------------------------------------------------------


def _walk(root: Path, skipped: Counter[str]) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        skipped["hidden"] += sum(n.startswith(".") for n in names) + sum(f.startswith(".") for f in files)
        names[:] = sorted(n for n in names if not n.startswith("."))
        yield from (Path(folder, f) for f in sorted(files) if not f.startswith("."))


def _refused(file: Path, skipped: Counter[str]) -> bool:
    """Count a file that cannot be read as text."""
    try:
        why = "binary" if _is_binary(file) else "empty" if file.stat().st_size == 0 else ""
    except OSError:
        why = "unreadable"
    skipped[why] += bool(why)
    return bool(why)


def _is_binary(file: Path) -> bool:
    if _kind(file) == "parquet":
        return False
    try:
        with _open(file) as stream:
            head = stream.read(_SNIFF)
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except (UnicodeDecodeError, gzip.BadGzipFile):
        return True
    except EOFError:  # text that ends early; reading it says so
        return False
    return b"\0" in head


def _kind(file: Path) -> str:
    """parquet, jsonl or text, by the name without a suffix of compression."""
    name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
    return "parquet" if name.endswith(".parquet") else "jsonl" if name.endswith((".jsonl", ".ndjson")) else "text"


def _open(file: Path) -> BinaryIO:
    name = file.name.lower()
    if name.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.open(file, "rb"))
    return file.open("rb")


# -- reading -----------------------------------------------------------------------------------------------------------


def _reader(file: Path) -> Any:
    return {"parquet": _parquet, "jsonl": _jsonl, "text": _text}[_kind(file)]


def _parquet(source: Source, file: Path) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if source.text_field not in names:
                raise DataError(f"{file}: no column {source.text_field!r}; it has {', '.join(names)} "
                                "(choose with text=NAME)")
            labelled = source.label_field in names
            columns = [source.text_field, source.label_field] if labelled else [source.text_field]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                texts = batch.column(source.text_field).to_pylist()
                labels = batch.column(source.label_field).to_pylist() if labelled else [""] * len(texts)
                for text, label in zip(texts, labels, strict=True):
                    yield Document(_text_of(text, file, source.text_field), str(label or ""))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: damaged or no Parquet file ({str(error).splitlines()[0][:160]})") from None


def _jsonl(source: Source, file: Path) -> Iterator[Document]:
    with _open(file) as stream:
        for number, line in enumerate(_lines(stream, file), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}: line {number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{file}: line {number} is no JSON object with a field {source.text_field!r}")
            if source.text_field not in row:
                raise DataError(f"{file}: line {number} has no field {source.text_field!r}; it has "
                                f"{', '.join(row) or 'none'} (choose with text=NAME)")
            text = _text_of(row[source.text_field], file, source.text_field)
            yield Document(text, str(row.get(source.label_field) or ""))


def _lines(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    try:
        yield from stream
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{file}: ends early or is damaged ({error})") from None


def _text_of(value: Any, file: Path, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{file}: {name!r} holds {type(value).__name__}, not text (choose another with text=NAME)")
    return value


def _text(source: Source, file: Path) -> Iterator[Document]:
    """The file as one document, or in pieces; line ends as they are, bytes that are no UTF-8 as U+FFFD."""
    piece = _piece(source, file)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    with _open(file) as stream:
        for block in iter(lambda: stream.read(_BLOCK), b""):
            held += decoder.decode(block)
            while len(held) >= 2 * piece:
                cut = _paragraph_end(held, piece)
                yield Document(held[:cut])
                held = held[cut:]
    held += decoder.decode(b"", final=True)
    yield Document(held)


def _piece(source: Source, file: Path) -> int:
    """Characters that a document of this file has at least, where there is enough for two."""
    size = file.stat().st_size
    if source.whole or (len(source.files) > 1 and size <= _LARGE):
        return sys.maxsize
    return _PIECE if len(source.files) > 1 else min(_PIECE, max(_LEAST_PIECE, size // _PIECES))


def _paragraph_end(text: str, wanted: int) -> int:
    """The first place after `wanted` characters where a paragraph ends, else a line, else a word, else there."""
    for mark in ("\n\n", "\n", " "):
        at = text.find(mark, wanted, 2 * wanted)
        if at >= 0:
            return at + len(mark)
    return wanted
