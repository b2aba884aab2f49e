"""`State`: everything a model remembers of the tokens it has read, in main memory.

An attention layer remembers keys and values of every token; a Gated DeltaNet layer a fixed-size matrix per head and
the last few convolution inputs. So a state has one part that grows and one that does not, and it can be copied and
continued but never shortened: going back means restoring a copy made earlier.

As bytes a state describes itself: magic, version, a JSON header (model fingerprint, layout, tokens), the arrays, and
a sha256 over all that precedes it. Reading checks sizes before allocating, and the sum before believing anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from hybridlm.config import LINEAR, HybridConfig
from hybridlm.errors import FormatError

__all__ = ["DeltaNetState", "KVState", "Layout", "State"]

_MAGIC, _VERSION = b"hlmstate", 1
_PREFIX = struct.Struct("<8sII")  # magic, version, header bytes
_MAX_HEADER = 1 << 28
_FIRST_CAPACITY = 256
KV_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of a model's state, and which model it belongs to.

    `layers` holds per layer ("gdn", channels, taps - 1, heads, K, V) or ("kv", heads, width).
    """

    fingerprint: str
    kv_dtype: str
    context: int  # most tokens a state may hold
    layers: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, config: HybridConfig, fingerprint: str, kv_dtype: str, context: int) -> Layout:
        gdn = ("gdn", config.conv_channels, config.linear_conv_kernel_dim - 1, config.value_heads, config.key_dim,
               config.value_dim)
        kv = ("kv", config.kv_heads, config.head_dim if config.has_attention else 0)
        return cls(fingerprint, kv_dtype, context, tuple(gdn if t == LINEAR else kv for t in config.layer_types))


@dataclass(slots=True)
class DeltaNetState:
    conv: np.ndarray  # float32 [channels q|k|v, taps - 1], oldest column first
    recurrent: np.ndarray  # float32 [Hv, K, V]


@dataclass(slots=True)
class KVState:
    k: np.ndarray  # [Hkv, capacity, head_dim], f32 or f16; entries from the state's position on are undefined
    v: np.ndarray


class State:
    """Memory of one sequence. Made by an engine; `position` tokens have been read, `tokens` lists them."""

    __slots__ = ("capacity", "layers", "layout", "position", "tokens", "valid")

    def __init__(self, layout: Layout, capacity: int = _FIRST_CAPACITY) -> None:
        """The empty state, with room for `capacity` tokens before it must grow."""
        self.layout = layout
        self.capacity = min(max(capacity, 1), layout.context)
        self.position = 0
        self.tokens: list[int] = []
        self.valid = True  # False after a pass that did not finish: layers then disagree about the past
        self.layers: list[DeltaNetState | KVState] = []
        for kind, *shape in layout.layers:
            if kind == "gdn":
                channels, taps, heads, key, value = shape
                self.layers.append(DeltaNetState(np.zeros((channels, taps), np.float32),
                                                 np.zeros((heads, key, value), np.float32)))
            else:
                heads, width = shape
                dtype = KV_DTYPES[layout.kv_dtype]
                self.layers.append(KVState(np.empty((heads, self.capacity, width), dtype),
                                           np.empty((heads, self.capacity, width), dtype)))

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, unused capacity included."""
        return sum(a.nbytes for layer in self.layers for a in _arrays(layer))

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` in all: capacity doubles until it suffices, never beyond the context."""
        if tokens <= self.capacity:
            return
        capacity = self.capacity
        while capacity < tokens:
            capacity *= 2
        self.capacity = max(min(capacity, self.layout.context), tokens)
        for layer in self.layers:
            if isinstance(layer, KVState):
                layer.k, layer.v = (self._grown(a) for a in (layer.k, layer.v))

    def _grown(self, old: np.ndarray) -> np.ndarray:
        new = np.empty((old.shape[0], self.capacity, old.shape[2]), old.dtype)
        new[:, :self.position] = old[:, :self.position]
        return new

    def append(self, tokens: list[int]) -> None:
        """Advance over tokens that a pass has just stored."""
        self.tokens.extend(tokens)
        self.position += len(tokens)

    def clone(self, room: int = 0) -> State:
        """An independent copy of the used part, with capacity for `room` more tokens."""
        copy = State.__new__(State)
        copy.layout, copy.position, copy.valid = self.layout, self.position, self.valid
        copy.tokens = self.tokens.copy()
        copy.capacity = max(1, min(self.position + room, self.layout.context))
        copy.layers = []
        for layer in self.layers:
            if isinstance(layer, KVState):
                copy.layers.append(KVState(copy._grown(layer.k), copy._grown(layer.v)))
            else:
                copy.layers.append(DeltaNetState(layer.conv.copy(), layer.recurrent.copy()))
        return copy

    # -- bytes ---------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The used part, self-describing and checksummed; the inverse of `from_bytes`."""
        stream = io.BytesIO()
        self.write(stream)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> State:
        """Rebuild a state. Raises `FormatError` when the bytes are damaged; whose state it is, `restore` checks."""
        view = memoryview(data)
        return cls.read(io.BytesIO(view), len(view), "state")

    def write(self, stream: BinaryIO) -> None:
        """`to_bytes` into a stream, without a second copy in memory."""
        layout = {"fingerprint": self.layout.fingerprint, "kv_dtype": self.layout.kv_dtype,
                  "context": self.layout.context, "layers": self.layout.layers}
        header = json.dumps({"layout": layout, "tokens": self.tokens}, separators=(",", ":")).encode()
        header += b" " * (-(len(header) + _PREFIX.size) % 64)
        digest = hashlib.sha256()
        for part in [_PREFIX.pack(_MAGIC, _VERSION, len(header)), header, *self._blobs()]:
            digest.update(part)
            stream.write(part)
        stream.write(digest.digest())

    def _blobs(self) -> list[Any]:
        """Contiguous buffers of the used part in layer order: conv, recurrent, or k and v one head at a time."""
        blobs: list[Any] = []
        for layer in self.layers:
            if isinstance(layer, KVState):
                heads = [*layer.k, *layer.v]
                blobs += [_bytes_of(head[:self.position]) for head in heads]
            else:
                blobs += [_bytes_of(layer.conv), _bytes_of(layer.recurrent)]
        return blobs

    @classmethod
    def read(cls, stream: BinaryIO, size: int, name: str) -> State:
        """`from_bytes` from a stream of `size` bytes; `name` is what errors call it."""

        def refuse(reason: str) -> FormatError:
            return FormatError(f"{name}: {reason}; read the text again to make a new one")

        prefix = stream.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or prefix[:8] != _MAGIC:
            raise refuse("not a saved hybridlm state")
        _, version, header_size = _PREFIX.unpack(prefix)
        if version != _VERSION:
            raise refuse(f"saved in version {version} of the format, this program reads version {_VERSION}")
        payload = size - _PREFIX.size - header_size - 32
        if header_size > _MAX_HEADER or payload < 0:
            raise refuse("truncated or damaged")
        header = stream.read(header_size)
        try:
            state, expected = cls._described(json.loads(header), payload)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise refuse("damaged header") from None
        if expected != payload:
            raise refuse("truncated or damaged")
        digest = hashlib.sha256(prefix)
        digest.update(header)
        for blob in state._blobs():
            if stream.readinto(blob) != len(blob):  # type: ignore[attr-defined]
                raise refuse("truncated")
            digest.update(blob)
        if stream.read(32) != digest.digest():
            raise refuse("damaged, its checksum does not match")
        return state

    @classmethod
    def _described(cls, header: dict[str, Any], limit: int) -> tuple[State, int]:
        """An allocated state as a header describes it and the bytes its arrays take, which must fit the file."""
        given = header["layout"]
        layers = tuple(tuple(layer) for layer in given["layers"])
        dtype, context, tokens = KV_DTYPES[given["kv_dtype"]], given["context"], header["tokens"]
        numbers = [n for layer in layers for n in layer[1:]] + [context, *tokens]
        if not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers) or not isinstance(given["fingerprint"], str):
            raise ValueError
        if len(tokens) > context or context == 0 or any(
                (layer[0], len(layer)) not in (("gdn", 6), ("kv", 3)) for layer in layers):
            raise ValueError
        expected = 0
        for kind, *s in layers:
            if kind == "gdn":
                expected += 4 * (s[0] * s[1] + s[2] * s[3] * s[4])
            else:
                expected += 2 * s[0] * len(tokens) * s[1] * dtype.itemsize
            # An empty sequence stores nothing of a KV layer, yet its arrays have one row: bound that too.
            if expected > limit or (kind == "kv" and s[0] * s[1] > 1 << 24):
                raise ValueError
        if len(layers) > 4096:
            raise ValueError
        state = cls(Layout(given["fingerprint"], given["kv_dtype"], context, layers), capacity=len(tokens))
        state.append(tokens)
        return state, expected

    def __repr__(self) -> str:
        return f"State(position={self.position}, nbytes={self.nbytes})"


def _arrays(layer: DeltaNetState | KVState) -> tuple[np.ndarray, np.ndarray]:
    return (layer.k, layer.v) if isinstance(layer, KVState) else (layer.conv, layer.recurrent)


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, also an empty one."""
    return memoryview(array.reshape(-1).view(np.uint8))
