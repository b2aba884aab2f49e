"""Softmax attention through PyTorch's fused kernels; the same function as `reference.attention`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops.reference import causal_mask

__all__ = ["fused_attention"]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None,
                    documents: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal: q [B, T, H, d]; k, v [B, S, Hkv, d], the first S - T keys from a cache.

    Without documents, and while no window cuts, this is the flash kernel. Otherwise a mask is made: T x S bytes, a
    row of documents each.
    """
    queries, keys = q.shape[1], k.shape[1]
    if window is not None and window >= keys:
        window = None
    plain = documents is None and window is None
    mask = None
    if not (plain and (queries == keys or queries == 1)):
        mask = causal_mask(queries, keys, window=window, documents=documents, device=q.device)
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       is_causal=mask is None and queries > 1, enable_gqa=k.shape[2] != q.shape[2])
    return o.transpose(1, 2)
