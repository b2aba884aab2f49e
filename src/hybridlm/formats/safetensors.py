"""One safetensors file: a bounds-checked, memory-mapped reader, and the writer's header.

The format is an 8-byte little-endian length, that many bytes of JSON (tensor name -> dtype, shape, data_offsets, and a
"__metadata__" object of strings), then the tensors' bytes without gaps. Everything the header says is checked against
the file before a byte of it is believed.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.errors import FormatError

__all__ = ["DTYPES", "SafetensorsFile", "TensorInfo", "header", "to_float32"]

MAX_HEADER_BYTES = 32 << 20  # the 7B's is 60 KB
MAX_DIMENSIONS = 8

# Bytes of an element.
DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
          "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says about one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class SafetensorsFile:
    """An open file. Its bytes stay mapped as long as an array from `raw` lives."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 8:
                    raise FormatError(f"{self.path}: truncated; {size} bytes are no safetensors file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read ({error.strerror})") from None
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        length = int.from_bytes(self._map[:8], "little")
        if length > size - 8:
            raise FormatError(f"{self.path}: truncated or damaged; its header claims {length} bytes")
        if length > MAX_HEADER_BYTES:
            raise FormatError(f"{self.path}: its header of {length} bytes is larger than any model's")
        self._start = 8 + length
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        try:
            content = json.loads(self._map[8 : self._start].decode("utf-8"), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self.path}: damaged header ({str(error)[:100]}); download it again") from None
        if not isinstance(content, dict):
            raise FormatError(f"{self.path}: damaged header (not a JSON object); download it again")
        metadata = content.pop("__metadata__", {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self._read(content, size - self._start)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor in the mapped file, uint8, read-only, no copy."""
        start = self._start + self._offsets[name]
        return self._bytes[start : start + self.tensors[name].nbytes]

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise FormatError(f"{self.path}: damaged header (a name occurs twice)")
        return found

    def _read(self, content: dict[str, Any], size: int) -> None:
        ends: list[tuple[int, int, str]] = []
        for name, entry in content.items():
            info, begin = self._entry(name, entry, size)
            self.tensors[name] = info
            self._offsets[name] = begin
            ends.append((begin, begin + info.nbytes, name))
        reached = 0
        for begin, end, name in sorted(ends):
            if begin != reached:
                raise FormatError(f"{self.path}: damaged header (tensor {name} overlaps another or leaves a gap)")
            reached = end
        if reached != size:
            raise FormatError(f"{self.path}: truncated or damaged; tensors end at {reached} of {size} bytes")

    def _entry(self, name: str, entry: Any, size: int) -> tuple[TensorInfo, int]:
        def damaged(what: str) -> FormatError:
            return FormatError(f"{self.path}: damaged header (tensor {name[:100]}: {what})")

        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise damaged("needs dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise damaged(f"unknown dtype {str(dtype)[:20]!r}")
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise damaged("impossible shape")
        if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
            raise damaged("data_offsets outside the file")
        nbytes = math.prod(shape) * DTYPES[dtype]
        if nbytes != offsets[1] - offsets[0]:
            raise damaged("size does not match its shape")
        return TensorInfo(name, dtype, tuple(shape), nbytes), offsets[0]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def header(tensors: list[TensorInfo], metadata: dict[str, str]) -> bytes:
    """The length and the JSON, padded so that the data starts at a multiple of 64 bytes."""
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for info in tensors:
        content[info.name] = {"dtype": info.dtype, "shape": list(info.shape),
                              "data_offsets": [position, position + info.nbytes]}
        position += info.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def to_float32(raw: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Raw bytes of a floating-point tensor as float32, flat; a view where the file holds float32 already."""
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if dtype == "BF16":
        wide = raw.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype in ("F16", "F64"):
        return raw.view("<f2" if dtype == "F16" else "<f8").astype(np.float32)
    raise FormatError(f"tensor {name}: {dtype} values are not supported; save the model in F32, BF16 or F16")
