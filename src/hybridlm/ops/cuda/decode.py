"""Launching the CUDA form of the Gated DeltaNet decoding step: the sizes it takes, its parameters."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hybridlm.ops.cuda.nvrtc import Kernel, load

__all__ = ["gdn_decode", "halves_for", "supported"]

BULK = 16  # items of a block from which the copy engine brings states, rather than threads 16 bytes at a time
_MOST = 232_448  # bytes of shared memory that a block may have on sm_90


class _Parameters(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in
                  ("q", "k", "v", "a", "b", "gate", "taps_q", "taps_k", "taps_v", "ssm_a", "dt_bias", "norm",
                   "recurrent", "conv", "positions", "out")),
                ("stride", ctypes.c_longlong), ("out_stride", ctypes.c_longlong), ("taps_stride", ctypes.c_int),
                ("layer", ctypes.c_int), ("items", ctypes.c_int), ("eps", ctypes.c_float), ("scale", ctypes.c_float),
                ("strength", ctypes.c_float)]


def halves_for(K: int, V: int) -> int | None:
    """Warps that share 32 columns of the state, each with a part of its rows; None: not these sizes."""
    for halves in (2, 4, 1):
        if V and V % 32 == 0 and K % (4 * halves) == 0 and V // 32 * halves <= 12 and K // (4 * halves) <= 24:
            return halves
    return None


def _threads(V: int, halves: int) -> int:
    """Of a block: those that compute, three warps that prepare, one that moves states."""
    return 32 * (V // 32 * halves + 4)


def _shared(K: int, V: int, halves: int, stages: int) -> tuple[int, int]:
    """Bytes of shared memory: for states, and in all."""
    states = 4 * K * V * stages
    return states, states + 16 * (K + V) + 16 * V * halves + 512


def supported(dtype: torch.dtype, K: int, V: int, device: torch.device) -> bool:
    """Whether this kernel takes such a layer; others are for Triton."""
    halves = halves_for(K, V)
    return dtype in (torch.bfloat16, torch.float32) and halves is not None and device.type == "cuda" \
        and _shared(K, V, halves, 2)[1] <= _MOST and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernel(heads: tuple[int, int], K: int, V: int, W: int, narrow: bool, rounds: int, bulk: bool,
            device: int) -> tuple[Kernel, int, int]:
    """The kernel for blocks of so many items (3: or more), its threads, and how many blocks a processor holds."""
    halves = halves_for(K, V)
    assert halves is not None
    threads = _threads(V, halves)
    stages = next(n for n in (3, 2, 1) if n <= rounds and _shared(K, V, halves, n)[1] <= _MOST)
    dynamic, total = _shared(K, V, halves, stages)
    sizes = {"HK": heads[0], "HV": heads[1], "K": K, "V": V, "W": W, "HALVES": halves, "STAGES": stages,
             "BULK": int(bulk), "BF16": int(narrow)}
    text = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
    kernel = load(text + (Path(__file__).parent / "decode.cu").read_text(), "gdn_decode", dynamic)
    return kernel, threads, min(_MOST // (total + 1024), 2048 // threads) or 1


def gdn_decode(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gate: Tensor, taps: tuple[Tensor, Tensor, Tensor],
               ssm_a: Tensor, dt_bias: Tensor, norm: Tensor, recurrent: Tensor, conv: Tensor, positions: Tensor,
               out: Tensor, *, layer: int, heads: tuple[int, int], eps: float, strength: float,
               overlap: bool = False) -> None:
    """`hybridlm.ops.triton.decode.gdn_decode`, for sizes that `supported` accepts."""
    K, V = q.shape[1] // heads[0], v.shape[1] // heads[1]
    device, items = q.device.index or 0, q.shape[0] * heads[1]
    rounds = -(-items // _processors(device))
    kernel, threads, blocks = _kernel(heads, K, V, taps[0].shape[0], q.dtype == torch.bfloat16, min(3, rounds),
                                     rounds > BULK, device)
    pointers = [x.data_ptr() for x in (q, k, v, a, b, gate, *taps, ssm_a, dt_bias, norm, recurrent, conv, positions,
                                       out)]
    parameters = _Parameters(*pointers, q.stride(0), out.stride(0), taps[0].stride(0), layer, items, eps, K**-0.5,
                             strength)
    kernel(min(items, blocks * _processors(device)), threads, parameters, overlap)
