"""The block types of ggml: their numbers, sizes, and decoding to float32 in numpy.

A quantised row is a run of blocks; a block holds `block` elements in `bytes` bytes. Decoding here is the readable
reference and the fallback for tools; the kernels in C++ do it at speed. Encoders are in `encode.py`.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

from hybridlm.errors import FormatError

__all__ = ["SIZES", "GGMLType", "block_size", "dequantize", "nbytes", "row_bytes", "type_of"]


class GGMLType(IntEnum):
    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


T = GGMLType
# Elements and bytes of a block.
SIZES: dict[GGMLType, tuple[int, int]] = {
    T.F32: (1, 4), T.F16: (1, 2), T.BF16: (1, 2), T.F64: (1, 8), T.I8: (1, 1), T.I16: (1, 2), T.I32: (1, 4),
    T.I64: (1, 8), T.Q4_0: (32, 18), T.Q4_1: (32, 20), T.Q5_0: (32, 22), T.Q5_1: (32, 24), T.Q8_0: (32, 34),
    T.Q2_K: (256, 84), T.Q3_K: (256, 110), T.Q4_K: (256, 144), T.Q5_K: (256, 176), T.Q6_K: (256, 210),
    T.IQ2_XXS: (256, 66), T.IQ2_XS: (256, 74), T.IQ2_S: (256, 82), T.IQ3_XXS: (256, 98), T.IQ3_S: (256, 110),
    T.IQ1_S: (256, 50), T.IQ1_M: (256, 56), T.IQ4_NL: (32, 18), T.IQ4_XS: (256, 136), T.TQ1_0: (256, 54),
    T.TQ2_0: (256, 66), T.MXFP4: (32, 17),
}


def type_of(name: str | int) -> GGMLType:
    """A type by its name ("q4_0", "bf16", "q4_K") or number. Raises `FormatError` for one that does not exist."""
    try:
        return GGMLType[name.upper()] if isinstance(name, str) else GGMLType(name)
    except (KeyError, ValueError):
        known = ", ".join(t.name.lower() for t in GGMLType)
        raise FormatError(f"type {name!r} is unknown; known are {known}") from None


def block_size(type: int) -> int:
    """Elements of a block."""
    return SIZES[GGMLType(type)][0]


def nbytes(type: int, elements: int) -> int:
    """Bytes of so many elements, which must be whole blocks."""
    block, size = SIZES[GGMLType(type)]
    if elements % block:
        raise FormatError(f"{elements} elements are not whole blocks of {GGMLType(type).name.lower()} ({block} each)")
    return elements // block * size


def row_bytes(type: int, cols: int) -> int:
    """Bytes of one row."""
    return nbytes(type, cols)


def dequantize(type: int, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Raw bytes as a fresh or read-only float32 array of `shape` (slowest axis first)."""
    kind = GGMLType(type)
    elements = math.prod(shape)
    if raw.nbytes != nbytes(kind, elements):
        raise FormatError(f"{raw.nbytes} bytes are not a {list(shape)} tensor of {kind.name.lower()}")
    flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    if kind == T.F32:
        return flat.view("<f4").astype(np.float32, copy=False).reshape(shape)
    if kind in (T.F16, T.F64, T.I8, T.I16, T.I32, T.I64):
        code = {T.F16: "<f2", T.F64: "<f8", T.I8: "i1", T.I16: "<i2", T.I32: "<i4", T.I64: "<i8"}[kind]
        return flat.view(code).astype(np.float32).reshape(shape)
    if kind == T.BF16:
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    blocks = flat.reshape(-1, SIZES[kind][1])
    decode = _DECODERS.get(kind)
    if decode is None:
        return _by_gguf(kind, flat).reshape(shape)
    return decode(blocks).astype(np.float32, copy=False).reshape(shape)


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """A half-precision number of each block, float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """The low halves of the bytes, then the high ones."""
    return np.concatenate([q & 15, q >> 4], axis=1)


def _high_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """32 bits of each block as 0 or 16."""
    return np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little") << 4


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * np.ascontiguousarray(b[:, 2:]).view(np.int8)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * _nibbles(b[:, 4:]) + _f16(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * ((_nibbles(b[:, 6:]) | _high_bits(b, 2)).astype(np.float32) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * (_nibbles(b[:, 8:]) | _high_bits(b, 4)) + _f16(b, 2)


def _scales_k4(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit scales and minima of eight groups of 32, packed in 12 bytes."""
    low, mid, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | (mid >> 6) << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _affine_k(b: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K from their codes [blocks, 8, 32]."""
    scales, minima = _scales_k4(b[:, 4:16])
    return (_f16(b, 0) * scales)[:, :, None] * q - (_f16(b, 2) * minima)[:, :, None]


def _groups_k(q: np.ndarray) -> np.ndarray:
    """128 bytes -> [blocks, 8, 32]: of each 32 bytes, low halves are one group and high halves the next."""
    q = q.reshape(-1, 4, 1, 32)
    return np.concatenate([q & 15, q >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _affine_k(b, _groups_k(b[:, 16:]))


def _q5_k(b: np.ndarray) -> np.ndarray:
    high = (b[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _affine_k(b, _groups_k(b[:, 48:]) | high << 4)


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & 3
    q = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return (_f16(b, 208) * scales)[:, :, None] * q


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * IQ4[_nibbles(b[:, 2:])]


_DECODERS = {T.Q8_0: _q8_0, T.Q4_0: _q4_0, T.Q4_1: _q4_1, T.Q5_0: _q5_0, T.Q5_1: _q5_1, T.Q4_K: _q4_k, T.Q5_K: _q5_k,
             T.Q6_K: _q6_k, T.IQ4_NL: _iq4_nl}


def _by_gguf(kind: GGMLType, flat: np.ndarray) -> np.ndarray:
    """The rarer types, which nothing here writes."""
    import gguf

    return gguf.quants.dequantize(flat, gguf.GGMLQuantizationType(int(kind)))
