"""Softmax attention through PyTorch's fused kernels; the same function as `reference.attention`.

Documents and windows both say the same thing of a query: the first key that it may see, which never falls along a row.
So a mask is one number a query, and of the blocks of 128 x 128 those between the first and the diagonal count. On a
GPU FlexAttention skips the others, and nothing of size T x T exists; a CPU gets the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hybridlm.ops.reference import causal_mask, document_starts

__all__ = ["AttentionMask", "attention_mask", "fused_attention"]

BLOCK = 128
AttentionMask = BlockMask | Tensor


@cache
def _flex() -> Callable[..., Tensor]:
    """Made when first needed: asking for a compiler loads it, which takes seconds."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, documents: Tensor | None = None,
                    mask: AttentionMask | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal: q [B, T, H, d]; k, v [B, S, Hkv, d], the first S - T keys from a cache.

    `mask` is `attention_mask` of the same window and documents, for several layers to share.
    """
    queries, keys = q.shape[1], k.shape[1]
    if mask is None and queries == keys:
        mask = attention_mask(queries, window=window, documents=documents, head_dim=q.shape[-1], device=q.device)
    elif mask is None and (queries > 1 or (window is not None and window < keys)):
        mask = causal_mask(queries, keys, window=window, device=q.device)
    grouped = k.shape[2] != q.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, BlockMask) and q.dtype == torch.float64:  # FlexAttention sums in float32
        mask = causal_mask(queries, keys, window=window, documents=documents, device=q.device)
    if isinstance(mask, BlockMask):
        return _flex()(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1,
                                          enable_gqa=grouped).transpose(1, 2)


def attention_mask(time: int, *, window: int | None = None, documents: Tensor | None = None, head_dim: int = 128,
                   device: torch.device | None = None) -> AttentionMask | None:
    """What T queries of T keys see; None where it is everything before them. `documents` int [B, T]."""
    if documents is None and (window is None or window >= time):
        return None
    # FlexAttention takes heads from 16 on, and shorter rows for a decoding step, with kernels of its own.
    if device is None or device.type != "cuda" or head_dim < 16 or time < BLOCK:
        return causal_mask(time, time, window=window, documents=documents, device=device)
    first = torch.zeros(1, time, dtype=torch.int32, device=device)
    now = torch.arange(time, dtype=torch.int32, device=device)[None]
    if documents is not None:
        first = (now * document_starts(documents)).cummax(1).values.int()
    if window is not None:
        first = torch.maximum(first, now - (window - 1))
    return block_mask(first)


def block_mask(first: Tensor) -> BlockMask:
    """FlexAttention's mask of the first key [B, T] that each query sees; it must not fall along T."""
    time = first.shape[1]
    padded = F.pad(first, (0, -time % BLOCK), mode="replicate") if time % BLOCK else first
    low, high = padded[:, ::BLOCK, None], padded[:, BLOCK - 1::BLOCK, None]  # over the queries of a block
    start = torch.arange(0, time, BLOCK, device=first.device)
    before = start[None, :] < start[:, None]
    whole = (before & (start >= high))[:, None]
    some = ((start[None, :] <= start[:, None]) & (start + BLOCK > low))[:, None] & ~whole

    shared = first[0]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= (shared[query] if first.shape[0] == 1 else first[b, query]))

    return BlockMask.from_kv_blocks(*_listed(some), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible,
                                    seq_lengths=(time, time))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks [B, 1, Q] a row of blocks has, and which [B, 1, Q, K], those first."""
    return blocks.sum(-1).int(), torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
