"""The chunked gated delta rule through the CUDA kernels: the forward and the backward pass, as a sequence of launches.

    forward     prepare, scan
    backward    prepare, scan (again, for each chunk's state and writes), reverse scan, gradient

The products and their letters are explained where they are made: prepare.cu, forward.cu, reverse.cu, gradient.cu. The
state and all sums are float32, left and right factors bfloat16, and those of T = (I + L)^-1 float16.

Long rows that start from nothing may run in segments side by side (launch.split). Who gives a state is in the middle of
a sequence: there no bit depends on where it was cut, as long as that was at a multiple of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.cuda import launch

__all__ = ["backward", "forward", "prepare"]


def prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None, norm: bool) -> Tensor:
    """The records of a call's chunks, for its forward and its backward pass."""
    return launch.prepare(launch.Rows.of(v, cu_seqlens), q, k, g, beta, norm)


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
            cu_seqlens: Tensor | None = None, norm: bool = True, records: Tensor | None = None
            ) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final states [N, H, K, V]. `records`: what `prepare` left, where that has been called.

    All contiguous; q, k, v bfloat16, g, beta and states float32, cu_seqlens int32.
    """
    rows = launch.Rows.of(v, cu_seqlens)
    records = launch.prepare(rows, q, k, g, beta, norm) if records is None else records
    o, final = torch.empty_like(v), g.new_empty(rows.sequences, v.shape[2], k.shape[3], v.shape[3])
    cuts = launch.split(rows, v, k.shape[3], norm) if initial_state is None else None
    launch.scan(rows, records, v, k.shape[3], o=o, initial=initial_state, final=final, cuts=cuts)
    return o, final


def backward(do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
             initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, norm: bool = True,
             records: Tensor | None = None
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v, g, beta and, where there is one, initial_state."""
    rows = launch.Rows.of(v, cu_seqlens)
    heads, (key_heads, key_dim) = v.shape[2], k.shape[2:]
    records = launch.prepare(rows, q, k, g, beta, norm) if records is None else records
    cuts = launch.split(rows, v, key_dim, norm) if initial_state is None else None
    states, writes = launch.new_states(rows, v, key_dim), launch.new_tiles(rows, v)
    launch.scan(rows, records, v, key_dim, tiles=writes, initial=initial_state, states=states, cuts=cuts)
    dstates, e = torch.empty_like(states), torch.empty_like(writes)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    launch.scan(rows, records, do, key_dim, tiles=e, initial=dfinal, final=dinitial, states=dstates, reverse=True,
                cuts=cuts)
    dq, dk, dv, dg, dbeta = launch.gradient(rows, records, v, do, e, writes, states, dstates, g, key_dim, norm)
    if heads != key_heads:
        dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial
