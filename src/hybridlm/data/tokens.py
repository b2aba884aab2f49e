"""A folder of token shards: what tokenisation leaves and training reads.

    manifest.json             what was tokenised by what, and every file with its sha256; written last
    train-00000.bin           tokens, little-endian uint16 or uint32
    train-00000.docs.npy      int64 [documents, 3]: first token within the shard, UTF-8 bytes, number of the label
    val-00000.bin, ...        the documents held out

A document is [eos, its tokens...]. The eos in front is what the first real token is predicted from, and the eos of the
next document is the target that ends this one, so every token of the stream is a target and none needs masking.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.errors import DataError

__all__ = ["MANIFEST", "TokenFolder", "TokenStream", "sha256_of"]

MANIFEST = "manifest.json"
VERSION = 1
START, BYTES, LABEL = 0, 1, 2  # columns of a documents table


@dataclass(frozen=True)
class TokenStream:
    """All tokens of one split behind one another, memory-mapped, as if they were one array."""

    shards: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]
    labels: tuple[str, ...] = ("",)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([0, *(len(s) for s in self.shards)], dtype=np.int64)

    @cached_property
    def documents(self) -> np.ndarray:
        """int64 [documents, 3], the first token counted from the start of the stream."""
        if not self.tables:
            return np.empty((0, 3), np.int64)
        shift = np.repeat(self._ends[:-1], [len(t) for t in self.tables])
        table = np.concatenate(self.tables)
        table[:, START] += shift
        return table

    @cached_property
    def starts(self) -> np.ndarray:
        """First token of each document, ascending."""
        return np.ascontiguousarray(self.documents[:, START])

    @property
    def nbytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens."""
        return int(self.documents[:, BYTES].sum())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        out = np.empty(stop - start, np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right")) - 1
        at = start
        while at < stop:
            base, end = int(self._ends[shard]), int(self._ends[shard + 1])
            upto = min(stop, end)
            out[at - start:upto - start] = self.shards[shard][at - base:upto - base]
            at, shard = upto, shard + 1
        return out

    def read_round(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, going round to the beginning at the end of the stream."""
        size = len(self)
        parts, at = [], start % size
        while count > 0:
            upto = min(size, at + count)
            parts.append(self.read(at, upto))
            count -= upto - at
            at = 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def each(self) -> Iterator[tuple[np.ndarray, int, str]]:
        """(tokens with the eos in front, UTF-8 bytes, label) of every document."""
        ends = [*self.starts[1:].tolist(), len(self)]
        for (start, size, label), end in zip(self.documents.tolist(), ends, strict=True):
            yield self.read(start, end), size, self.labels[label]


@dataclass(frozen=True)
class TokenFolder:
    """An opened folder of shards."""

    path: Path
    manifest: dict[str, Any]
    train: TokenStream
    val: TokenStream

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> TokenFolder:
        """Map the shards that the manifest names; `verify` compares each file's sha256.

        Raises `DataError` when the folder is unfinished, incomplete or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path)
        labels = tuple(manifest["labels"])
        splits: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {"train": ([], []), "val": ([], [])}
        for shard in manifest["shards"]:
            for name, digest in shard["files"].items():
                file = path / name
                if not file.is_file():
                    raise DataError(f"{file}: missing; delete {path} to tokenise again")
                if verify and sha256_of(file) != digest:
                    raise DataError(f"{file}: damaged (its sha256 differs from the manifest's); delete {path} "
                                    "to tokenise again")
            tokens, table = (path / name for name in shard["files"])
            shards, tables = splits[shard["split"]]
            shards.append(np.memmap(tokens, np.dtype(manifest["dtype"]).newbyteorder("<"), "r"))
            tables.append(np.load(table))
            if len(shards[-1]) != shard["tokens"]:
                raise DataError(f"{tokens}: {len(shards[-1])} tokens where the manifest counts {shard['tokens']}; "
                                f"delete {path} to tokenise again")
        train, val = (TokenStream(tuple(s), tuple(t), labels) for s, t in splits.values())
        return cls(path, manifest, train, val)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished folder."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no {MANIFEST}, so no finished folder of tokens") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path / MANIFEST}: damaged ({error}); delete {path} to tokenise again") from None
    if manifest.get("version") != VERSION:
        raise DataError(f"{path / MANIFEST}: version {manifest.get('version')} is not {VERSION}; "
                        f"delete {path} to tokenise again")
    return manifest


def sha256_of(file: Path) -> str:
    """sha256 of a file's content, 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
