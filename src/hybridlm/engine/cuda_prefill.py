"""Stretches of more than one token of a sequence: the chunked delta rule between its projections, and attention over
what the sequence has stored. The matrix products of a prefill; single tokens have kernels of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.config import HybridConfig
from hybridlm.engine.cuda_state import KV_DTYPES, CudaPages, CudaState
from hybridlm.engine.layout import PAGE
from hybridlm.engine.weights import DeltaNetLayer
from hybridlm.ops import chunk_gated_delta_rule, fused_attention, gated_rms_norm, short_convolutions

__all__ = ["chunked_delta_rule", "segment_attention", "side_by_side"]


def side_by_side(*parts: Tensor) -> Tensor:
    """Columns [T, n_i] as one tensor [T, sum of n_i]: a view where they are neighbours in one, as products
    leave them."""
    first, size, end = parts[0], sum(x.shape[1] for x in parts), parts[0].data_ptr()
    for x in parts:
        if x.data_ptr() != end or x.stride() != first.stride() or first.stride(0) < size:
            return torch.cat(parts, 1)
        end += x.shape[1] * x.element_size()
    return first.as_strided((len(first), size), first.stride())


def chunked_delta_rule(c: HybridConfig, w: DeltaNetLayer, state: CudaState, slot: int, inputs: tuple[Tensor, ...],
                       position: int, kernels: bool) -> Tensor:
    """Gated DeltaNet between its projections for T tokens of one sequence from `position` on; moves the state on.

    inputs: q, k [T, Hk K], v [T, Hv V], a, b [T, Hv], gate [T, Hv V]. Returns [T, Hv V]. Without `kernels` the delta
    rule is PyTorch's, the form that kernels are measured against.
    """
    *qkv, a, b, gate = inputs
    time, keys, values = len(gate), c.key_heads * c.key_dim, c.value_heads * c.value_dim
    ring, taps = state.conv[slot], w.conv_q.data[:, :2 * keys + values].T
    width = len(ring)
    start = (position + 1) % width  # of the oldest input that still counts
    past = torch.cat([ring[start:], ring[:start]])[:width - 1]
    x = side_by_side(*qkv)
    (q, k, v), _ = short_convolutions(x[None], [t.contiguous() for t in taps.split([keys, keys, values])], past[None])
    for i in range(max(0, time - width), time):
        ring[(position + i) % width] = x[i]
    decay = w.ssm_a * F.softplus(a.float() + w.dt_bias)
    beta = (2.0 if c.linear_allow_neg_eigval else 1.0) * b.float().sigmoid()
    o, final = chunk_gated_delta_rule(
        q.unflatten(-1, (c.key_heads, c.key_dim)), k.unflatten(-1, (c.key_heads, c.key_dim)),
        v.unflatten(-1, (c.value_heads, c.value_dim)), decay[None], beta[None],
        initial_state=state.recurrent[slot][None], chunk_size=None if kernels or q.dtype == torch.float32 else 64)
    state.recurrent[slot].copy_(final[0])
    gate = gate.unflatten(-1, (c.value_heads, c.value_dim))
    return gated_rms_norm(o[0], gate, w.norm, c.gdn_norm_eps).flatten(-2)


def segment_attention(q: Tensor, pages: CudaPages, slot: int, position: int, window: int, kernels: bool) -> Tensor:
    """Causal attention of T tokens of one sequence, from `position` on, over its pages, which hold theirs already.

    q [T, H d]; window in tokens, 0 for all. Returns [T, H d].
    """
    layout, time = pages.layout, len(q)
    heads, width = layout.kv
    first, last = layout.first_page(pages.group, position), -(-(position + time) // PAGE)
    if kernels:
        from hybridlm.ops.triton.paged_attention import gather_pages

        kv = gather_pages(pages.table, first, last - first, layer=slot, kv_heads=heads, width=width,
                          dtype=KV_DTYPES[layout.kv_type])
    else:
        found: list[Any] = [page[slot] for page in pages.pages[first:last] if page is not None]
        kv = torch.cat(found, 2)
    skip = max(0, position - window + 1) - first * PAGE if window else 0  # keys that even the first token is past
    k, v = (x[None, :, skip:position + time - first * PAGE].to(q.dtype) for x in kv)  # [1, Hkv, S, d]
    o = _attend(q.view(1, time, -1, width), k, v, window)
    return o.reshape(time, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [1, T, H, d], k, v [1, Hkv, S, d], the last query at the last key."""
    queries, keys = q.shape[1], k.shape[2]
    if q.is_cuda and queries < keys and (not window or window >= keys):
        from torch.nn.attention.bias import causal_lower_right

        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=causal_lower_right(queries, keys),
                                           enable_gqa=k.shape[1] != q.shape[2])
        return o.transpose(1, 2)
    return fused_attention(q, k.transpose(1, 2), v.transpose(1, 2), window=window or None)
