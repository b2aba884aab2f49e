"""The header of a GGUF file, read with a cursor that cannot leave the file."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from hybridlm.errors import FormatError

__all__ = ["Cursor", "Value", "ValueType"]

MAX_STRINGS = 4 << 20  # of all arrays together; the largest vocabularies have half a million tokens and merges


class ValueType(IntEnum):
    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_CODES = {ValueType.UINT8: "B", ValueType.INT8: "b", ValueType.UINT16: "H", ValueType.INT16: "h", ValueType.UINT32: "I",
          ValueType.INT32: "i", ValueType.FLOAT32: "f", ValueType.BOOL: "?", ValueType.UINT64: "Q",
          ValueType.INT64: "q", ValueType.FLOAT64: "d"}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value where it lies: `count` elements of `type` (an array) or one (`count` is None)."""

    key: str
    type: ValueType
    count: int | None
    start: int
    stop: int
    map: mmap.mmap

    def decode(self) -> Any:
        """As Python: int, float, bool, str, or a list of one of them."""
        if self.count is not None and self.count > MAX_STRINGS:
            raise FormatError(f"metadata {self.key}: an array of {self.count} elements is larger than any model's")
        if self.type != ValueType.STRING:
            count = 1 if self.count is None else self.count
            numbers = struct.unpack(f"<{count}{_CODES[self.type]}", self.map[self.start : self.stop])
            return numbers[0] if self.count is None else list(numbers)
        data = self.map[self.start : self.stop]
        try:
            if self.count is None:
                return data[8:].decode("utf-8")
            strings, at = [], 0
            for _ in range(self.count):
                (size,) = _U64.unpack_from(data, at)
                strings.append(data[at + 8 : at + 8 + size].decode("utf-8"))
                at += 8 + size
            return strings
        except UnicodeDecodeError:
            raise FormatError(f"metadata {self.key}: not UTF-8 text") from None


class Cursor:
    """Reads little-endian values one after the other; reading past the end is a `FormatError`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._strings = 0
        self.position = 0

    def take(self, count: int) -> bytes:
        start = self.position
        self.skip(count)
        return self._data[start : self.position]

    def skip(self, count: int) -> None:
        if count > self._size - self.position:
            raise FormatError("truncated or damaged header (a value reaches beyond the end of the file)")
        self.position += count

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def count(self, most: int, what: str) -> int:
        value = self.u64()
        if value > most:
            raise FormatError(f"damaged header ({value} {what})")
        return value

    def text(self, what: str, most: int) -> str:
        size = self.u64()
        if not 0 < size <= most:
            raise FormatError(f"damaged header ({what} of {size} bytes)")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"damaged header ({what} is not UTF-8)") from None

    def value(self, key: str) -> Value:
        """The next metadata value, its type in front, left undecoded."""
        kind = self._type(key)
        count = None
        if kind == ValueType.ARRAY:
            kind = self._type(key)
            if kind == ValueType.ARRAY:
                raise FormatError(f"metadata {key[:100]!r}: arrays of arrays are not supported")
            count = self.u64()
        start = self.position
        if kind != ValueType.STRING:
            self.skip(struct.calcsize("<" + _CODES[kind]) * (1 if count is None else count))
        elif count is None:
            self.skip(self.u64())
        else:
            self._skip_strings(count, key)
        return Value(key, kind, count, start, self.position, self._data)

    def _type(self, key: str) -> ValueType:
        number = self.u32()
        try:
            return ValueType(number)
        except ValueError:
            raise FormatError(f"metadata {key[:100]!r}: unknown type {number}") from None

    def _skip_strings(self, count: int, key: str) -> None:
        self._strings += count
        if self._strings > MAX_STRINGS or count > (self._size - self.position) // 8:
            raise FormatError(f"metadata {key[:100]!r}: {count} strings are more than the file can hold")
        data, at, last, unpack = self._data, self.position, self._size - 8, _U64.unpack_from
        for _ in range(count):
            if at > last:
                raise FormatError(f"metadata {key[:100]!r}: truncated (a string reaches beyond the end of the file)")
            at += 8 + unpack(data, at)[0]
        self.skip(at - self.position)
