"""Float32 rows -> blocks of a ggml type: plain types in numpy, quantised ones by native encoders, else gguf-py's."""

from __future__ import annotations

from functools import cache

import numpy as np

from hybridlm.errors import FormatError
from hybridlm.formats.blocks import SIZES, GGMLType, row_bytes

__all__ = ["can_encode", "encodable", "encode"]

# What gguf-py can write too, slowly, of the types that the engine can read.
_BY_GGUF = {GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0}
_PLAIN = {GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.F64: "<f8"}


def encode(type: int, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of x, float32 [rows, cols], as uint8 [rows, bytes of a row].

    `importance` [cols] weighs the error of each column, where the type's encoder can use it. Raises `FormatError` for
    a type without encoder, for values that are not finite, and for values too large for f16.
    """
    kind = GGMLType(type)
    if not np.isfinite(x).all():
        raise FormatError("values that are not finite (NaN or infinity); the checkpoint is damaged")
    if kind in _PLAIN:
        with np.errstate(over="ignore"):
            y = x.astype(_PLAIN[kind], copy=False)
        if kind == GGMLType.F16 and not np.isfinite(y).all():
            raise FormatError("values beyond the range of f16 (65504); convert to bf16 or f32")
        return np.ascontiguousarray(y).view(np.uint8).reshape(len(x), -1)
    if kind == GGMLType.BF16:
        return _bf16(np.ascontiguousarray(x)).view(np.uint8).reshape(len(x), -1)
    if _native(kind):
        from hybridlm import native

        out = np.empty((len(x), row_bytes(kind, x.shape[1])), dtype=np.uint8)
        native.quantize(int(kind), np.ascontiguousarray(x, dtype=np.float32), out, importance)
        return out
    if kind in _BY_GGUF:
        import gguf

        return gguf.quants.quantize(np.ascontiguousarray(x), gguf.GGMLQuantizationType(int(kind)))
    raise FormatError(f"type {kind.name.lower()} cannot be written; these can: "
                      f"{', '.join(t.name.lower() for t in encodable())}")


def can_encode(type: int) -> bool:
    """Whether `encode` has an encoder for a type here."""
    kind = GGMLType(type)
    return kind in _PLAIN or kind == GGMLType.BF16 or _native(kind) or kind in _BY_GGUF


@cache
def encodable() -> tuple[GGMLType, ...]:
    """All types that `encode` can write here."""
    return tuple(t for t in GGMLType if can_encode(t))


def _bf16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even; finite values that would round up to infinity become the largest finite one."""
    bits = x.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    overflow = (rounded & 0x7FFF) == 0x7F80
    return np.where(overflow, (rounded & 0x8000) | 0x7F7F, rounded).astype("<u2")


@cache
def _native(kind: GGMLType) -> bool:
    if SIZES[kind][0] == 1:
        return False
    try:
        from hybridlm import native

        block, size = SIZES[kind]
        native.quantize(int(kind), np.zeros((1, block), np.float32), np.empty((1, size), np.uint8))
    except (ImportError, AttributeError, ValueError):  # no native module, or a type that it does not write
        return False
    return True
