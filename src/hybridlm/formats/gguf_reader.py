"""Our own reader of GGUF files: memory-mapped, bounds-checked, quick.

Opening walks the header once and believes nothing: every length, offset, type and alignment is checked against the
file's size, names must be unique, tensors must lie apart inside the file. Large strings and arrays (a vocabulary) are
skipped then and decoded when they are asked for. Whatever is wrong is a `FormatError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hybridlm.config import HybridConfig
from hybridlm.errors import ConfigError, FormatError
from hybridlm.formats.blocks import SIZES, GGMLType, dequantize
from hybridlm.formats.gguf_header import Cursor, Value, ValueType
from hybridlm.formats.names import check, specs

__all__ = ["ARCHITECTURE", "GGUFFile", "GGUFTensor"]

ARCHITECTURE = "olmo-hybrid"
MAX_ENTRIES, MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_ALIGNMENT = 65_536, 65_536, 4, 256, 1 << 16


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]  # slowest axis first, as in torch
    type: GGMLType
    offset: int
    nbytes: int


class Metadata(Mapping[str, Any]):
    """Key -> value, decoded when first asked for."""

    def __init__(self, values: dict[str, Value]) -> None:
        self.raw = values
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self.raw[key].decode()
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)


class GGUFFile:
    """An open GGUF file. Arrays from `data` stay valid as long as they live, even after `close`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 24:
                    raise FormatError(f"{self.path}: not a GGUF file ({size} bytes)")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read ({error.strerror})") from None
        self._bytes: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8)
        self.nbytes = size
        try:
            self._read_header()
        except FormatError as error:
            self.close()
            raise FormatError(f"{self.path}: {error}") from None

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map a file and check its header."""
        return cls(path)

    def _read_header(self) -> None:
        cursor = Cursor(self._map)
        if cursor.take(4) != b"GGUF":
            raise FormatError("not a GGUF file")
        version = cursor.u32()
        if version not in (2, 3):
            swapped = version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3")
            raise FormatError("big-endian GGUF is not supported" if swapped else
                              f"GGUF version {version} is not supported; 2 and 3 are")
        tensors, entries = cursor.count(MAX_TENSORS, "tensors"), cursor.count(MAX_ENTRIES, "metadata entries")
        values: dict[str, Value] = {}
        for _ in range(entries):
            key = cursor.text("a metadata key", MAX_NAME_BYTES * 16)
            if key in values:
                raise FormatError(f"damaged header (metadata key {key[:100]!r} occurs twice)")
            values[key] = cursor.value(key)
        self.metadata = Metadata(values)
        infos = [self._tensor_info(cursor) for _ in range(tensors)]
        alignment = 32
        if (value := values.get("general.alignment")) is not None and value.count is None:
            alignment = value.decode()
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise FormatError(f"damaged header (alignment {alignment!r})")
        self.alignment = alignment
        self._header_end = cursor.position
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise FormatError(f"damaged header (tensor {name[:100]!r} occurs twice)")
            self.tensors[name] = self._place(name, shape, kind, offset, start)
        reached = start
        for t in sorted(self.tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            if t.offset < reached:
                raise FormatError(f"damaged header (tensor {t.name[:100]!r} overlaps another)")
            reached = t.offset + t.nbytes

    def _tensor_info(self, cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.text("a tensor's name", MAX_NAME_BYTES)
        dimensions = cursor.u32()
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise FormatError(f"damaged header (tensor {name[:100]!r} has {dimensions} dimensions)")
        shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
        return name, shape, cursor.u32(), cursor.u64()

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> GGUFTensor:
        def damaged(what: str) -> FormatError:
            return FormatError(f"damaged header (tensor {name[:100]!r}: {what})")

        try:
            known = GGMLType(kind)
        except ValueError:
            raise damaged(f"type {kind} is unknown; a newer format?") from None
        block, size = SIZES[known]
        if 0 in shape:
            raise damaged("has no elements")
        if shape[-1] % block:
            raise damaged(f"rows of {shape[-1]} are not whole blocks of {known.name.lower()}")
        nbytes = math.prod(shape) // block * size
        if offset % self.alignment or start + offset + nbytes > self.nbytes:
            raise damaged("lies outside the file, which is truncated or damaged" if offset % self.alignment == 0
                          else "is not aligned")
        return GGUFTensor(name, shape, known, start + offset, nbytes)

    # -- tensors -------------------------------------------------------------------------------------------------

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor in the mapped file: uint8, flat, read-only, no copy."""
        if self._bytes is None:
            raise FormatError(f"{self.path}: is closed")
        t = self.tensors[name]
        return self._bytes[t.offset : t.offset + t.nbytes]

    def array(self, name: str) -> np.ndarray:
        """A tensor decoded to float32."""
        t = self.tensors[name]
        return dequantize(t.type, self.data(name), t.shape)

    def check(self) -> None:
        """Raise `FormatError` unless the tensors are exactly those of `config`."""
        found = {t.name: t.shape for t in self.tensors.values()}
        check(found, {s.gguf: s.shape for s in specs(self.config)}, str(self.path))

    # -- what the metadata say -----------------------------------------------------------------------------------

    @cached_property
    def config(self) -> HybridConfig:
        """The model's configuration."""
        text = self._text("hybridlm.config")
        if text is None:
            kind = (self._text("general.architecture") or "")[:50]
            raise FormatError(f"{self.path}: holds a {kind!r} model without hybridlm's configuration; make the file "
                              "from the original model with 'hybridlm convert'")
        try:
            data = json.loads(text)
            if len(data["layer_types"]) > len(self.tensors):
                raise FormatError("more layers than tensors")
            return HybridConfig.from_dict(data)
        except (ConfigError, FormatError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError,
                RecursionError) as error:
            raise FormatError(f"{self.path}: its configuration is damaged ({str(error)[:200]})") from None

    @property
    def tokenizer_json(self) -> str | None:
        """The whole `tokenizer.json`, or None."""
        return self._text("tokenizer.huggingface.json")

    @property
    def chat_template(self) -> str | None:
        """The chat template's source, or None."""
        return self._text("tokenizer.chat_template")

    def _text(self, key: str) -> str | None:
        value = self.metadata.raw.get(key)
        if value is None:
            return None
        if value.type != ValueType.STRING or value.count is not None:
            raise FormatError(f"{self.path}: {key} is not text")
        return str(self.metadata[key])

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that tell this model from any other: of the header, and of samples of every tensor."""
        digest = hashlib.sha256(self._map[: self._header_end])
        for t in self.tensors.values():
            data, middle = self.data(t.name), t.nbytes // 2
            for at in (0, middle, max(0, t.nbytes - 1024)):
                digest.update(data[at : at + 1024].tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file; it stays mapped until the last array from `data` is gone."""
        self._bytes = None
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.close()
