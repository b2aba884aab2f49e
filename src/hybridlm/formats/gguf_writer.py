"""GGUF files written through gguf-py: its header, then our tensors' bytes as they are produced.

The file gets its name when it is complete (see `atomic.py`), and no more of a tensor is in memory than one block of
rows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from hybridlm.atomic import atomic_write
from hybridlm.formats.blocks import GGMLType, nbytes
from hybridlm.formats.gguf_header import Value, ValueType
from hybridlm.formats.resume import resumable_write

__all__ = ["Entry", "Progress", "TensorPlan", "boolean", "boolean_list", "f32", "i32_list", "strings", "text", "u32",
           "write_gguf"]

Progress = Callable[[int, int], None]  # bytes written, bytes in all
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """A metadata value with its type in the file; `array`: it is a list of that type."""

    value: Any
    type: ValueType
    array: bool = False

    @classmethod
    def copy(cls, value: Value) -> Entry:
        """The same value as in a file that is open."""
        return cls(value.decode(), value.type, value.count is not None)


def u32(value: int) -> Entry:
    return Entry(value, ValueType.UINT32)


def f32(value: float) -> Entry:
    return Entry(value, ValueType.FLOAT32)


def text(value: str) -> Entry:
    return Entry(value, ValueType.STRING)


def boolean(value: bool) -> Entry:
    return Entry(value, ValueType.BOOL)


def strings(value: list[str]) -> Entry:
    return Entry(value, ValueType.STRING, True)


def i32_list(value: list[int]) -> Entry:
    return Entry(value, ValueType.INT32, True)


def boolean_list(value: list[bool]) -> Entry:
    return Entry(value, ValueType.BOOL, True)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to come: `produce` is called when its turn comes and yields its bytes in order."""

    name: str
    shape: tuple[int, ...]  # slowest axis first
    type: GGMLType
    produce: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return nbytes(self.type, prod(self.shape))


def write_gguf(
    path: str | Path, architecture: str, entries: Mapping[str, Entry], tensors: list[TensorPlan],
    progress: Progress | None = None, *, resume: str | None = None,
) -> int:
    """Write a file and return its size. An exception, Ctrl-C or a kill leaves nothing under `path`.

    `resume`: what the tensors are made from, in a few words that differ when their bytes may. A writer that was stopped
    then leaves `path`.partial, and the next one of the same file goes on after the last whole tensor.
    """
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    for key, entry in entries.items():
        if key == "general.architecture" or (entry.array and not entry.value):
            continue
        kind = gguf.GGUFValueType(int(entry.type))
        if entry.array:
            writer.add_key_value(key, entry.value, gguf.GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, entry.value, kind)
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, gguf.GGMLQuantizationType(int(t.type)))
    total = sum(t.nbytes for t in tensors)
    head = io.BytesIO()
    writer.fout, writer.state = [cast(Any, head)], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    with _open(path, head.getvalue(), resume, total) as file:
        if not file.done:
            file.write(head.getvalue())
            file.finish()
        for i, t in enumerate(tensors, 1):
            if i >= file.done:
                file.write(bytes(-file.tell() % ALIGNMENT))
                written = 0
                for block in t.produce():
                    file.write(cast(Any, block))
                    written += block.nbytes
                    if progress:
                        progress(done + written, total)
                if written != t.nbytes:
                    raise ValueError(f"{t.name}: {written} bytes produced, {t.nbytes} planned")
                file.finish()
            done += t.nbytes
        file.write(bytes(-file.tell() % ALIGNMENT))
        return int(file.tell())


class _Whole:
    """A file that is written in one go, with the face of `resume.Pieces`."""

    done = 0

    def __init__(self, file: Any) -> None:
        self.write, self.tell = file.write, file.tell

    def finish(self) -> None:
        pass


@contextmanager
def _open(path: str | Path, head: bytes, resume: str | None, size: int) -> Iterator[Any]:
    if resume is None:
        with atomic_write(path, size=size) as file:
            yield _Whole(file)
    else:
        key = hashlib.sha256(resume.encode() + b"\n" + head).hexdigest()
        with resumable_write(path, key, size) as pieces:
            yield pieces
