"""Launching the CUDA kernels of the chunked gated delta rule: the sizes they take, their parameters, one call each."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from hybridlm.ops.cuda.nvrtc import Kernel, load
from hybridlm.ops.cuda.source import source

__all__ = ["prepare", "reverse_scan", "scan", "supported", "warpgroups"]

CHUNK = 64
_GROUP = CHUNK * 16 + 32  # as in tiles.cuh
_SHARED = 232448  # bytes a block may have on sm_90
_MULTIPROCESSORS = 132
_WHOLE = 1 << 20  # chunks in a part: more than any row has


class _Scan(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in
                  ("q", "k", "v", "inverse", "scores", "factors", "carry", "bounds", "offsets", "initial", "final", "o",
                   "states")),
                *((name, ctypes.c_int) for name in ("heads", "key_heads", "value_dim", "time", "split"))]


class _Prepare(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in
                  ("q", "k", "g", "beta", "bounds", "offsets", "inverse", "scores", "factors", "carry")),
                *((name, ctypes.c_int) for name in ("heads", "key_heads", "time", "sequences", "normalise")),
                ("scale", ctypes.c_float)]


def supported(dtype: torch.dtype, key_dim: int, value_dim: int, device: torch.device) -> bool:
    """Whether these kernels take such inputs; others are for Triton."""
    return dtype == torch.bfloat16 and key_dim % 16 == 0 and 16 <= key_dim <= 128 and value_dim % 64 == 0 \
        and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def warpgroups(tasks: int, key_dim: int, value_dim: int) -> int:
    """How many slabs of 64 values a block takes, for `tasks` pairs of row and head: few fill the chip, many share k.

    The time of a chunk in a block of 1, 2 or 3 warpgroups, in microseconds on an H200, times the rounds of blocks.
    """
    slabs = value_dim // 64
    widths = [w for w in (3, 2, 1) if slabs % w == 0 and (w < 3 or key_dim <= 96)]
    return min(widths, key=lambda w: -(-tasks * (slabs // w) // _MULTIPROCESSORS) * (0.0, 0.7, 1.1, 1.6)[w])


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@cache
def _scan_kernel(key_dim: int, width: int, output: bool, reverse: bool, device: int) -> Kernel:
    stage = (2 * key_dim // 8 + 2 * CHUNK // 8 + width * 8) * _GROUP + 1056
    stages = min(4, _SHARED // (stage + 16))
    text = source("stage.cuh", "reverse.cu" if reverse else "forward.cu", "scan.cu", K=key_dim, WARPGROUPS=width,
                  STAGES=stages, OUTPUT=int(output), REVERSE=int(reverse))
    return load(text, "scan", stages * (stage + 16))


@cache
def _prepare_kernel(key_dim: int, device: int) -> Kernel:
    tiles = max(2 * key_dim // 8 * _GROUP, CHUNK * 72 * 4) + 2 * CHUNK // 8 * _GROUP
    return load(source("prepare.cu", K=key_dim), "prepare", tiles + 1024)


def prepare(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, prepared: tuple[Tensor, Tensor, Tensor, Tensor], *,
            bounds: Tensor | None, offsets: Tensor | None, time: int, sequences: int, normalise: bool) -> None:
    """Fill `prepared`: T and P [chunks, H, 64, 64] bfloat16, factors [chunks, H, 7, 64] and carry [chunks, H] float32."""
    inverse = prepared[0]
    chunks, heads = inverse.shape[:2]
    key_heads, key_dim = k.shape[-2:]
    call = _Prepare(*map(_at, (q, k, g, beta, bounds, offsets, *prepared)), heads, key_heads, time, sequences,
                    int(normalise), key_dim**-0.5)
    _prepare_kernel(key_dim, q.device.index)(chunks * heads, 128, call)


def scan(q: Tensor, k: Tensor, v: Tensor, prepared: tuple[Tensor, ...], o: Tensor, *, rows: int, time: int,
         initial: Tensor | None = None, final: Tensor | None = None, states: Tensor | None = None,
         bounds: Tensor | None = None, offsets: Tensor | None = None, split: int = _WHOLE, output: bool = True,
         reverse: bool = False, width: int | None = None) -> None:
    """Carry the state through all chunks of each row; o gets the result, or without `output` the writes.

    `reverse` is the backward pass: v is the gradient of o, `initial` that of the final state, `final` that of the
    initial one, `states` gets the gradient of the state at each chunk's end, and o that of T's right-hand side.
    """
    key_heads, key_dim = k.shape[-2:]
    heads, value_dim = v.shape[-2:]
    width = width or warpgroups(rows * heads, key_dim, value_dim)
    call = _Scan(*map(_at, (q, k, v, *prepared, bounds, offsets, initial, final, o, states)), heads, key_heads, value_dim,
                 time, split)
    blocks = rows * heads * (value_dim // (64 * width))
    _scan_kernel(key_dim, width, output, reverse, q.device.index)(blocks, (width + 1) * 128, call)
