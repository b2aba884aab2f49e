"""The chunked gated delta rule on a GPU: launches of the Triton kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hybridlm.ops.triton.delta_rule_forward import prepare_kernel, scan_kernel

CHUNK = 64


def widths(key_dim: int) -> tuple[int, int]:
    """A key width as two powers of two, the second possibly padded or 0: 96 = 64 + 32."""
    first = 1 << (key_dim.bit_length() - 1)
    rest = key_dim - first
    return first, (max(16, triton.next_power_of_2(rest)) if rest else 0)


def prepare(q, k, g, beta, bounds, offsets, chunks, *, norm=True, precision="fp16", num_warps=4):
    batch, time, key_heads, key_dim = k.shape
    heads = beta.shape[2]
    ka, kb = widths(key_dim)
    inverse = q.new_empty(chunks, heads, CHUNK, CHUNK)
    scores = torch.empty_like(inverse)
    factors = torch.empty(chunks, heads, 4, CHUNK, dtype=torch.float32, device=q.device)
    carry = torch.empty(chunks, heads, dtype=torch.float32, device=q.device)
    prepare_kernel[heads, chunks](
        q, k, g, beta, bounds, offsets, inverse, scores, factors, carry, time,
        0 if bounds is None else len(bounds) - 1, key_dim**-0.5, H=heads, HK=key_heads, K=key_dim, KA=ka, KB=kb,
        NORM=norm, VARLEN=bounds is not None, PRECISION="ieee" if q.dtype == torch.float32 else precision,
        num_warps=num_warps, num_stages=1)
    return inverse, scores, factors, carry


def scan(q, k, v, prepared, bounds, offsets, initial, *, states=None, BV=64, num_warps=4, num_stages=2):
    inverse, scores, factors, carry = prepared
    batch, time, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[2:]
    ka, kb = widths(key_dim)
    n = batch if bounds is None else len(bounds) - 1
    o = torch.empty_like(v)
    final = torch.empty(n, heads, key_dim, value_dim, dtype=torch.float32, device=q.device)
    scan_kernel[triton.cdiv(value_dim, BV), heads, n](
        q, k, v, inverse, scores, factors, carry, bounds, offsets, initial, o, states, final, time, n,
        H=heads, HK=key_heads, K=key_dim, V=value_dim, KA=ka, KB=kb, BV=BV, INITIAL=initial is not None, OUTPUT=True,
        STATES=states is not None, VARLEN=bounds is not None, num_warps=num_warps, num_stages=num_stages)
    return o, final


def layout(batch: int, time: int, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """(first token of each sequence, first chunk of each sequence, an upper bound of the number of chunks)."""
    if cu_seqlens is None:
        return None, None, batch * triton.cdiv(time, CHUNK)
    bounds = cu_seqlens.to(torch.int32)
    counts = (bounds[1:] - bounds[:-1] + (CHUNK - 1)) // CHUNK
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return bounds, offsets, triton.cdiv(time, CHUNK) + len(bounds) - 1


def forward(q, k, v, g, beta, initial_state=None, cu_seqlens=None, norm=True):
    bounds, offsets, chunks = layout(q.shape[0], q.shape[1], cu_seqlens)
    prepared = prepare(q, k, g, beta, bounds, offsets, chunks, norm=norm)
    return scan(q, k, v, prepared, bounds, offsets, initial_state)
