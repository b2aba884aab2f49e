"""The chunked gated delta rule on a GPU: launches of the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hybridlm.ops.triton.delta_rule_backward import gradient_kernel, reverse_scan_kernel
from hybridlm.ops.triton.delta_rule_forward import prepare_kernel, scan_kernel

CHUNK = 64


def widths(key_dim: int) -> tuple[int, int]:
    """A key width as two powers of two, the second possibly padded or 0: 96 = 64 + 32."""
    first = 1 << (key_dim.bit_length() - 1)
    rest = key_dim - first
    return first, (max(16, triton.next_power_of_2(rest)) if rest else 0)


class Shape(NamedTuple):
    """What all launches need to know of a call."""

    batch: int
    time: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    bounds: Tensor | None  # int32 [N + 1], each sequence's first token
    offsets: Tensor | None  # int32 [N + 1], each sequence's first chunk
    sequences: int
    chunks: int  # an upper bound

    @classmethod
    def of(cls, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Shape:
        batch, time, key_heads, key_dim = k.shape
        heads, value_dim = v.shape[2:]
        if cu_seqlens is None:
            return cls(batch, time, key_heads, heads, key_dim, value_dim, None, None, batch,
                       batch * triton.cdiv(time, CHUNK))
        bounds = cu_seqlens.to(torch.int32)
        counts = (bounds[1:] - bounds[:-1] + (CHUNK - 1)) // CHUNK
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        n = len(bounds) - 1
        return cls(batch, time, key_heads, heads, key_dim, value_dim, bounds, offsets, n, triton.cdiv(time, CHUNK) + n)

    def constants(self) -> dict:
        ka, kb = widths(self.key_dim)
        return {"H": self.heads, "HK": self.key_heads, "K": self.key_dim, "KA": ka, "KB": kb,
                "VARLEN": self.bounds is not None}


def prepare(shape: Shape, q, k, g, beta, norm=True, precision="fp16", split=True, num_warps=4, maxnreg=None):
    inverse = q.new_empty(shape.chunks, shape.heads, CHUNK, CHUNK)
    rest_inverse = torch.empty_like(inverse) if split else None
    scores = torch.empty_like(inverse)
    factors = torch.empty(shape.chunks, shape.heads, 7, CHUNK, dtype=torch.float32, device=q.device)
    carry = torch.empty(shape.chunks, shape.heads, dtype=torch.float32, device=q.device)
    prepare_kernel[shape.heads, shape.chunks](
        q, k, g, beta, shape.bounds, shape.offsets, inverse, rest_inverse, scores, factors, carry, shape.time,
        shape.sequences, shape.key_dim**-0.5, **shape.constants(), NORM=norm, SPLIT=split, maxnreg=maxnreg,
        PRECISION="ieee" if q.dtype == torch.float32 else precision, num_warps=num_warps, num_stages=1)
    return inverse, rest_inverse, scores, factors, carry


def scan(shape: Shape, q, k, v, prepared, initial, *, output=True, states=None, writes=None, BV=64, num_warps=4,
         num_stages=2):
    o = torch.empty_like(v) if output else None
    final = torch.empty(shape.sequences, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32,
                        device=q.device) if output else None
    scan_kernel[triton.cdiv(shape.value_dim, BV), shape.heads, shape.sequences](
        q, k, v, *prepared, shape.bounds, shape.offsets, initial, o, states, writes, final, shape.time,
        shape.sequences, **shape.constants(), V=shape.value_dim, BV=BV, INITIAL=initial is not None, OUTPUT=output,
        STATES=states is not None, SPLIT=prepared[1] is not None, num_warps=num_warps, num_stages=num_stages)
    return o, final


def forward(q, k, v, g, beta, initial_state=None, cu_seqlens=None, norm=True):
    shape = Shape.of(k, v, cu_seqlens)
    return scan(shape, q, k, v, prepare(shape, q, k, g, beta, norm), initial_state)


def reverse_scan(shape: Shape, q, k, do, dfinal, prepared, need_initial, BV=64, num_warps=4, num_stages=2):
    dv = torch.empty_like(do)
    dstates = do.new_empty(shape.chunks, shape.heads, shape.value_dim, shape.key_dim)
    dinitial = torch.empty_like(dfinal) if need_initial else None
    reverse_scan_kernel[triton.cdiv(shape.value_dim, BV), shape.heads, shape.sequences](
        q, k, do, *prepared, shape.bounds, shape.offsets, dfinal, dv, dstates, dinitial, shape.time, shape.sequences,
        **shape.constants(), V=shape.value_dim, BV=BV, INITIAL=need_initial, SPLIT=prepared[1] is not None,
        num_warps=num_warps, num_stages=num_stages)
    return dv, dstates, dinitial


def gradients(shape: Shape, q, k, g, do, dv, writes, states, dstates, prepared, norm=True, BV=64, num_warps=4,
              num_stages=1, maxnreg=None):
    inverse, _, scores, factors, carry = prepared  # the first two are overwritten
    dq = q.new_empty(shape.batch, shape.time, shape.heads, shape.key_dim)
    dk = torch.empty_like(dq)
    dg = torch.empty(shape.batch, shape.time, shape.heads, dtype=torch.float32, device=q.device)
    dbeta = torch.empty_like(dg)
    gradient_kernel[shape.heads, shape.chunks](
        q, k, g, do, dv, writes, states, dstates, factors, carry, inverse, scores, shape.bounds, shape.offsets, dq,
        dk, dg, dbeta, shape.time, shape.sequences, shape.value_dim, shape.key_dim**-0.5, **shape.constants(),
        V=shape.value_dim, BV=BV, NORM=norm, FLOOR=-110.0, maxnreg=maxnreg, num_warps=num_warps, num_stages=num_stages)
    if shape.heads != shape.key_heads:
        dq, dk = (x.unflatten(2, (shape.key_heads, -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
    return dq, dk, dg, dbeta


def backward(do, dfinal, q, k, v, g, beta, initial_state=None, cu_seqlens=None, norm=True):
    shape = Shape.of(k, v, cu_seqlens)
    prepared = prepare(shape, q, k, g, beta, norm)
    states = q.new_empty(shape.chunks, shape.heads, shape.value_dim, shape.key_dim)
    writes = torch.empty_like(v)
    scan(shape, q, k, v, prepared, initial_state, output=False, states=states, writes=writes)
    dv, dstates, dinitial = reverse_scan(shape, q, k, do, dfinal, prepared, initial_state is not None)
    dq, dk, dg, dbeta = gradients(shape, q, k, g, do, dv, writes, states, dstates, prepared, norm)
    return dq, dk, dv, dg, dbeta, dinitial
