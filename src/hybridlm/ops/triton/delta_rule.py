"""The chunked gated delta rule on a GPU: launches of the Triton kernels.

`prepare` fills, for each chunk of 64 tokens and value head, what the scans need (`Prepared`); `scan` and `reverse_scan`
carry the state and its gradient through a sequence; `gradients` does the rest of the backward pass in parallel.
All tensors are contiguous, gates and states float32. The mathematics is in `delta_rule_forward` and
`delta_rule_backward`.

Errors of results and gradients, bfloat16 on an H200 against float64: 3e-3 with ordinary inputs. With beta near 2 and
keys 5% apart (I + L)^-1 has entries of alternating sign that cancel, and T decides: in bfloat16 the error is 2.2e-1
(flash-linear-attention: 1.4e-1). So T is kept as a sum of two bfloat16 matrices, which costs a product of 64 x 64 more
per chunk and slab and brings 4e-2; the rest is the rounding of x and w.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridlm.ops.triton.delta_rule_backward import gradient_kernel, reverse_scan_kernel
from hybridlm.ops.triton.delta_rule_forward import prepare_kernel, scan_kernel

__all__ = ["CHUNK", "LAUNCH", "Prepared", "Shape", "backward", "forward", "gradients", "prepare", "reverse_scan",
           "scan", "widths"]

CHUNK = 64
SLAB = 64  # values per program of the scans: what one warpgroup multiplies at once

# Fastest of those tried on an H200 at K = 96, V = 192.
LAUNCH: dict[str, dict[str, Any]] = {
    "prepare_kernel": {"num_warps": 4, "num_stages": 1, "maxnreg": 128},
    "scan_kernel": {"num_warps": 4, "num_stages": 2},
    "reverse_scan_kernel": {"num_warps": 4, "num_stages": 2},
    "gradient_kernel": {"num_warps": 4, "num_stages": 3},
}


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
    chunks: int  # of all sequences, or an upper bound

    @classmethod
    def of(cls, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Shape:
        batch, time, key_heads, key_dim = k.shape
        heads, value_dim = v.shape[2:]
        chunks = -(-time // CHUNK)
        if cu_seqlens is None:
            return cls(batch, time, key_heads, heads, key_dim, value_dim, None, None, batch, batch * chunks)
        bounds = cu_seqlens.to(torch.int32)
        counts = (bounds[1:] - bounds[:-1] + (CHUNK - 1)) // CHUNK
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        n = len(bounds) - 1
        return cls(batch, time, key_heads, heads, key_dim, value_dim, bounds, offsets, n, chunks + n)

    def constants(self) -> dict[str, Any]:
        first, second = widths(self.key_dim)
        return {"H": self.heads, "HK": self.key_heads, "K": self.key_dim, "KA": first, "KB": second,
                "VARLEN": self.bounds is not None}


class Prepared(NamedTuple):
    """What `prepare` leaves for the scans; the first three in the type of q, the others float32."""

    inverse: Tensor  # [chunks, H, 64, 64], T, and what its rounding leaves out:
    rest_inverse: Tensor
    scores: Tensor  # [chunks, H, 64, 64], P
    factors: Tensor  # [chunks, H, 7, 64], see prepare_kernel
    carry: Tensor  # [chunks, H], the decay of a whole chunk


def prepare(shape: Shape, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, norm: bool) -> Prepared:
    inverse, rest, scores = (q.new_empty(shape.chunks, shape.heads, CHUNK, CHUNK) for _ in range(3))
    prepared = Prepared(inverse, rest, scores, g.new_empty(shape.chunks, shape.heads, 7, CHUNK),
                        g.new_empty(shape.chunks, shape.heads))
    prepare_kernel[shape.heads, shape.chunks](
        q, k, g, beta, shape.bounds, shape.offsets, *prepared, shape.time, shape.sequences, shape.key_dim**-0.5,
        **shape.constants(), NORM=norm, PRECISION="ieee" if q.dtype == torch.float32 else "fp16",
        **LAUNCH["prepare_kernel"])
    return prepared


def scan(shape: Shape, q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, initial: Tensor | None, *,
         states: Tensor | None = None, writes: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """(o, final states); with `states` and `writes` fill these instead (see `scan_kernel`)."""
    output = states is None
    o = torch.empty_like(v) if output else None
    final = prepared.carry.new_empty(shape.sequences, shape.heads, shape.key_dim, shape.value_dim) if output else None
    scan_kernel[triton.cdiv(shape.value_dim, SLAB), shape.heads, shape.sequences](
        q, k, v, *prepared, shape.bounds, shape.offsets, initial, o, states, writes, final, shape.time,
        shape.sequences, **shape.constants(), V=shape.value_dim, BV=SLAB, INITIAL=initial is not None, OUTPUT=output,
        STATES=not output, **LAUNCH["scan_kernel"])
    return o, final


def reverse_scan(shape: Shape, q: Tensor, k: Tensor, do: Tensor, dfinal: Tensor, prepared: Prepared,
                 need_initial: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dv, the gradient of each chunk's final state [chunks, H, V, K], that of the initial states)."""
    dv = torch.empty_like(do)
    dstates = do.new_empty(shape.chunks, shape.heads, shape.value_dim, shape.key_dim)
    dinitial = torch.empty_like(dfinal) if need_initial else None
    reverse_scan_kernel[triton.cdiv(shape.value_dim, SLAB), shape.heads, shape.sequences](
        q, k, do, *prepared, shape.bounds, shape.offsets, dfinal, dv, dstates, dinitial, shape.time, shape.sequences,
        **shape.constants(), V=shape.value_dim, BV=SLAB, INITIAL=need_initial,
        **LAUNCH["reverse_scan_kernel"])
    return dv, dstates, dinitial


def gradients(shape: Shape, q: Tensor, k: Tensor, g: Tensor, do: Tensor, dv: Tensor, writes: Tensor, states: Tensor,
              dstates: Tensor, prepared: Prepared, norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dg, dbeta). Overwrites `prepared.inverse` and `prepared.scores`."""
    dq = q.new_empty(shape.batch, shape.time, shape.heads, shape.key_dim)
    dk, dg, dbeta = torch.empty_like(dq), torch.empty_like(g), torch.empty_like(g)
    gradient_kernel[shape.heads, shape.chunks](
        q, k, g, do, dv, writes, states, dstates, prepared.factors, prepared.carry, prepared.scores, prepared.inverse,
        shape.bounds, shape.offsets, dq, dk, dg, dbeta, shape.time, shape.sequences, shape.value_dim,
        shape.key_dim**-0.5, **shape.constants(), V=shape.value_dim, BV=SLAB, NORM=norm,
        **LAUNCH["gradient_kernel"])
    if shape.heads != shape.key_heads:
        dq, dk = (x.unflatten(2, (shape.key_heads, -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
    return dq, dk, dg, dbeta


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
            cu_seqlens: Tensor | None = None, norm: bool = True) -> tuple[Tensor, Tensor]:
    """(o, final states), as `hybridlm.ops.chunk_gated_delta_rule`."""
    shape = Shape.of(k, v, cu_seqlens)
    o, final = scan(shape, q, k, v, prepare(shape, q, k, g, beta, norm), initial_state)
    assert o is not None and final is not None
    return o, final


def backward(do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
             initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, norm: bool = True
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v, g, beta and initial_state, from those of o and the final states."""
    shape = Shape.of(k, v, cu_seqlens)
    prepared = prepare(shape, q, k, g, beta, norm)
    states = q.new_empty(shape.chunks, shape.heads, shape.value_dim, shape.key_dim)
    writes = torch.empty_like(v)
    scan(shape, q, k, v, prepared, initial_state, states=states, writes=writes)
    dv, dstates, dinitial = reverse_scan(shape, q, k, do, dfinal, prepared, initial_state is not None)
    dq, dk, dg, dbeta = gradients(shape, q, k, g, do, dv, writes, states, dstates, prepared, norm)
    return dq, dk, dv, dg, dbeta, dinitial
