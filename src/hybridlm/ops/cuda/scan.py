"""Launching the CUDA scan over chunks (scan.cu): sizes it takes, its parameters, one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hybridlm.ops.cuda.nvrtc import Kernel, load
from hybridlm.ops.cuda.source import source

__all__ = ["CHUNK", "scan"]

CHUNK = 64
_GROUP = CHUNK * 16 + 32  # as in common.cuh
_SHARED = 232448  # bytes a block may have on sm_90


class _Scan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in
                ("q", "k", "v", "inverse", "scores", "factors", "carry", "bounds", "offsets", "initial", "final", "o",
                 "states")] + \
               [(name, ctypes.c_int) for name in ("heads", "key_heads", "value_dim", "time", "split")]


def stage_bytes(key_dim: int, warpgroups: int) -> int:
    """Shared memory of one stage: k, q, A, P, v and the scalars of a chunk."""
    return (2 * key_dim // 8 + 2 * CHUNK // 8 + warpgroups * 8) * _GROUP + 1056


def _kernel(key_dim: int, warpgroups: int, output: bool) -> Kernel:
    stage = stage_bytes(key_dim, warpgroups)
    stages = min(4, (_SHARED - 64) // stage)
    text = source("scan.cu", K=key_dim, WARPGROUPS=warpgroups, STAGES=stages, OUTPUT=int(output),
                  SWAP_COLUMNS=SWAP_COLUMNS, SWAP_ROWS=SWAP_ROWS)
    return load(text, "scan", stages * (stage + 16))


SWAP_COLUMNS = SWAP_ROWS = 0


def scan(q: Tensor, k: Tensor, v: Tensor, prepared: tuple[Tensor, ...], o: Tensor, *, initial: Tensor | None = None,
         final: Tensor | None = None, states: Tensor | None = None, bounds: Tensor | None = None,
         offsets: Tensor | None = None, time: int = 0, split: int = 1 << 20, rows: int, warpgroups: int,
         output: bool = True) -> None:
    key_heads, key_dim = k.shape[-2:]
    heads, value_dim = v.shape[-2:]

    def at(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    call = _Scan(at(q), at(k), at(v), *map(at, prepared), at(bounds), at(offsets), at(initial), at(final), at(o),
                 at(states), heads, key_heads, value_dim, time, split)
    slabs = value_dim // (64 * warpgroups)
    _kernel(key_dim, warpgroups, output)(rows * heads * slabs, (warpgroups + 1) * 128, call)
