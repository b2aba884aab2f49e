"""Launching the CUDA form of the Gated DeltaNet decoding step: the sizes it takes, its parameters."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hybridlm.ops.cuda.nvrtc import Kernel, load

__all__ = ["gdn_decode", "supported", "threads_for"]

_MOST = 232_448  # bytes of shared memory that a block may have on sm_90


class _Parameters(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in
                  ("q", "k", "v", "a", "b", "gate", "taps_q", "taps_k", "taps_v", "ssm_a", "dt_bias", "norm",
                   "recurrent", "conv", "positions", "out")),
                ("stride", ctypes.c_longlong), ("out_stride", ctypes.c_longlong), ("taps_stride", ctypes.c_int),
                ("layer", ctypes.c_int), ("items", ctypes.c_int), ("eps", ctypes.c_float), ("scale", ctypes.c_float),
                ("strength", ctypes.c_float)]


def threads_for(K: int, V: int) -> int | None:
    """Threads of a block, each with four columns of every so many rows of the state; None: not these sizes."""
    if V % 4 or K * V % 16:
        return None
    columns = V // 4
    for groups in (4, 8, 2, 16, 12, 6, 24, 32):
        threads = columns * groups
        if K % groups == 0 and threads % 32 == 0 and 96 <= threads <= 512 and K // groups <= 24:
            return threads
    return None


def _shared(K: int, V: int, threads: int, stages: int) -> tuple[int, int]:
    """Bytes of shared memory: for states, and in all."""
    states = 4 * K * V * stages
    return states, states + 4 * (2 * K + V) + 8 * V * (threads // (V // 4)) + 512


def supported(dtype: torch.dtype, K: int, V: int, device: torch.device) -> bool:
    """Whether this kernel takes such a layer; others are for Triton."""
    threads = threads_for(K, V)
    return dtype in (torch.bfloat16, torch.float32) and threads is not None and device.type == "cuda" \
        and _shared(K, V, threads, 2)[1] <= _MOST and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _kernel(heads: tuple[int, int], K: int, V: int, W: int, narrow: bool, device: int
            ) -> tuple[Kernel, int, int]:
    """The kernel, its threads, and the blocks that the device holds at once."""
    threads = threads_for(K, V)
    assert threads is not None
    stages = next(n for n in (3, 2) if _shared(K, V, threads, n)[1] <= _MOST)
    dynamic, total = _shared(K, V, threads, stages)
    sizes = {"HK": heads[0], "HV": heads[1], "K": K, "V": V, "W": W, "THREADS": threads, "STAGES": stages,
             "BF16": int(narrow)}
    text = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
    kernel = load(text + (Path(__file__).parent / "decode.cu").read_text(), "gdn_decode", dynamic)
    blocks = min(_MOST // (total + 1024), 2048 // threads) or 1
    return kernel, threads, blocks * torch.cuda.get_device_properties(device).multi_processor_count


def gdn_decode(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gate: Tensor, taps: tuple[Tensor, Tensor, Tensor],
               ssm_a: Tensor, dt_bias: Tensor, norm: Tensor, recurrent: Tensor, conv: Tensor, positions: Tensor,
               out: Tensor, *, layer: int, heads: tuple[int, int], eps: float, strength: float,
               overlap: bool = False) -> None:
    """`hybridlm.ops.triton.decode.gdn_decode`, for sizes that `supported` accepts."""
    K, V = q.shape[1] // heads[0], v.shape[1] // heads[1]
    kernel, threads, most = _kernel(heads, K, V, taps[0].shape[0], q.dtype == torch.bfloat16, q.device.index or 0)
    pointers = [x.data_ptr() for x in (q, k, v, a, b, gate, *taps, ssm_a, dt_bias, norm, recurrent, conv, positions,
                                       out)]
    items = q.shape[0] * heads[1]
    parameters = _Parameters(*pointers, q.stride(0), out.stride(0), taps[0].stride(0), layer, items, eps, K**-0.5,
                             strength)
    kernel(min(items, most), threads, parameters, overlap)
