"""Attention of a decoding step over keys and values in pages, and what precedes it: norms, rotary embedding, storing.

A page holds PAGE tokens of all layers of its group: [layers, K or V, Hkv, PAGE, d], contiguous, so a head's keys of a
page are one run of memory. Rows find their pages by address: `tables` holds for each row the address of its own table,
whose entry p is the address of the page of tokens from p * PAGE on. Address 0 marks a row that only fills up the batch.

The tokens that a row sees are divided among SPLITS programs, BLOCK by BLOCK, by the row's own length alone; the program
that finishes last joins the parts in order. So a row's result does not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["decode_attention", "gather_pages", "store_qkv"]

PAGE = tl.constexpr(128)  # tokens of a page, the engine's
BLOCK = tl.constexpr(64)  # tokens that a program reads together, a part of a page
SPLITS = 16


@triton.jit(do_not_specialize=["layer", "window"])
def _decode_attention(q, tables, positions, out, parts, counters, q_stride, out_stride, layer, window, scale,
                      HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
                      SPLIT: tl.constexpr, DTYPE: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    address = tl.load(tables + row)
    length = (tl.load(positions + row) + 1).to(tl.int32)
    if OVERLAP:  # addresses and positions were there before the step; queries and the newest keys come from just before
        gdc_wait()
    if address == 0:
        return
    start = tl.maximum(length - window, 0) if window > 0 else 0
    first, blocks = start // BLOCK, tl.cdiv(length, BLOCK)
    share = tl.cdiv(blocks - first, SPLIT)
    used = tl.cdiv(blocks - first, share)  # splits that have something to do
    if split >= used:
        return
    table = address.to(tl.pointer_type(tl.int64))
    rg, rd, rt = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BLOCK)
    here = (rg < GROUP)[:, None] & (rd < D)[None, :]
    qt = tl.load(q + row * q_stride + (head * GROUP + rg[:, None]) * D + rd[None, :], mask=here, other=0.0)
    offset = (layer.to(tl.int64) * 2 * HKV + head) * (PAGE * D)
    m = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BD), tl.float32)
    begin = first + split * share
    for block in range(begin, tl.minimum(begin + share, blocks)):
        page = tl.multiple_of(tl.load(table + block * BLOCK // PAGE).to(tl.pointer_type(DTYPE)), 16)
        base = page + offset + block * BLOCK % PAGE * D
        tile = rt[:, None] * D + rd[None, :]
        kt = tl.load(base + tile, mask=(rd < D)[None, :], other=0.0)
        scores = tl.dot(qt, tl.trans(kt), input_precision="ieee") * scale
        at = block * BLOCK + rt
        scores = tl.where(((at >= start) & (at < length))[None, :], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrink = tl.exp(m - new)
        total = total * shrink + tl.sum(weights, 1)
        vt = tl.load(base + HKV * PAGE * D + tile, mask=(rd < D)[None, :], other=0.0)
        acc = tl.dot(weights.to(DTYPE), vt, acc * shrink[:, None], input_precision="ieee")
        m = new
    if used > 1:
        # [row, head, split]: the weighted sum [GROUP, BD], then the maxima and the totals [GROUP]
        SIZE: tl.constexpr = GROUP * BD + 2 * GROUP
        spot = row * HKV + head
        mine = parts + (spot * SPLIT) * SIZE
        tile = rg[:, None] * BD + rd[None, :]
        real = rg < GROUP
        tl.store(mine + split * SIZE + tile, acc, mask=real[:, None])
        tl.store(mine + split * SIZE + GROUP * BD + rg, m, mask=real)
        tl.store(mine + split * SIZE + GROUP * BD + GROUP + rg, total, mask=real)
        tl.debug_barrier()
        done = tl.atomic_add(counters + spot, 1, sem="acq_rel")
        if done < used - 1:
            return
        tl.store(counters + spot, 0)
        m = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        acc = tl.zeros((BG, BD), tl.float32)
        for i in range(used):
            m_i = tl.load(mine + i * SIZE + GROUP * BD + rg, mask=real, other=0.0, cache_modifier=".cg")
            new = tl.maximum(m, m_i)
            shrink, grow = tl.exp(m - new), tl.exp(m_i - new)
            more = tl.load(mine + i * SIZE + GROUP * BD + GROUP + rg, mask=real, other=1.0, cache_modifier=".cg")
            total = total * shrink + grow * more
            acc = acc * shrink[:, None] + grow[:, None] * tl.load(mine + i * SIZE + tile, mask=real[:, None], other=0.0,
                                                                  cache_modifier=".cg")
            m = new
    y = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + (head * GROUP + rg[:, None]) * D + rd[None, :], y, mask=here)


def decode_attention(q: Tensor, tables: Tensor, positions: Tensor, out: Tensor, parts: Tensor, counters: Tensor, *,
                     layer: int, kv_heads: int, width: int, window: int, dtype: torch.dtype,
                     overlap: bool = False) -> None:
    """softmax(q K^T / sqrt(d)) V for one token of each row.

    q, out [B, H d]; tables, positions int64 [B]; `layer` counts within the pages; `window` in tokens, 0 for all.
    parts float32 and counters int32 (zero, and left zero): room as `attention_room` tells.
    """
    group = q.shape[1] // (kv_heads * width)
    BG, BD = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(width))
    _decode_attention[(SPLITS, kv_heads, q.shape[0])](
        q, tables, positions, out, parts, counters, q.stride(0), out.stride(0), layer, window, width**-0.5,
        HKV=kv_heads, GROUP=group, D=width, BG=BG, BD=BD, SPLIT=SPLITS, DTYPE=_TYPES[dtype],
        OVERLAP=overlap, num_warps=4, num_stages=3, launch_pdl=overlap)


def attention_room(rows: int, heads: int, kv_heads: int, width: int) -> tuple[int, int]:
    """Floats of `parts` and ints of `counters` for so many rows."""
    group = heads // kv_heads
    return rows * kv_heads * SPLITS * group * (max(16, triton.next_power_of_2(width)) + 2), rows * kv_heads


@triton.jit(do_not_specialize=["layer"])
def _store_qkv(q, k, v, q_weight, k_weight, inv_freq, q_out, tables, positions, stride, out_stride, layer, eps,
               rope_scale, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
               ROPE: tl.constexpr, DTYPE: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    address = tl.load(tables + row)
    position = tl.load(positions + row)
    if OVERLAP:
        gdc_wait()
    if address == 0:
        return
    if part == 0:
        y = _normed(q + row * stride, q_weight, inv_freq, position, eps, rope_scale, H * D, D, BQ, ROPE)
        cq = tl.arange(0, BQ)
        tl.store(q_out + row * out_stride + cq, y.to(q_out.dtype.element_ty), mask=cq < H * D)
    else:
        table = address.to(tl.pointer_type(tl.int64))
        page = tl.multiple_of(tl.load(table + position // PAGE).to(tl.pointer_type(DTYPE)), 16)
        c = tl.arange(0, BK)
        at = (c // D) * (PAGE * D) + (position % PAGE).to(tl.int32) * D + c % D
        if part == 1:
            keys = _normed(k + row * stride, k_weight, inv_freq, position, eps, rope_scale, HKV * D, D, BK, ROPE)
            tl.store(page + layer.to(tl.int64) * 2 * HKV * PAGE * D + at, keys.to(DTYPE), mask=c < HKV * D)
        else:
            x = tl.load(v + row * stride + c, mask=c < HKV * D, other=0.0)
            tl.store(page + (layer.to(tl.int64) * 2 + 1) * HKV * PAGE * D + at, x.to(DTYPE), mask=c < HKV * D)


@triton.jit
def _normed(x, weight, inv_freq, position, eps, rope_scale, SIZE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
            ROPE: tl.constexpr):
    """RMSNorm over a whole row, then each head's halves rotated."""
    c = tl.arange(0, BLOCK)
    mask = c < SIZE
    y = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
    size = tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
    y = y * size * tl.load(weight + c, mask=mask, other=0.0)
    if ROPE:
        low = c % D < D // 2
        partner = tl.where(low, c + D // 2, c - D // 2)
        other = tl.load(x + partner, mask=mask, other=0.0).to(tl.float32) * size
        other *= tl.load(weight + partner, mask=mask, other=0.0)
        angle = position.to(tl.float32) * tl.load(inv_freq + c % (D // 2), mask=mask, other=0.0)
        y = (y * tl.cos(angle) + tl.where(low, -other, other) * tl.sin(angle)) * rope_scale
    return y


def store_qkv(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, inv_freq: Tensor | None,
              tables: Tensor, positions: Tensor, q_out: Tensor, *, layer: int, width: int, eps: float,
              rope_scale: float, dtype: torch.dtype, overlap: bool = False) -> None:
    """Queries normed and rotated into `q_out`; keys, the same way, and values into the pages of their rows.

    q [T, H d], k, v [T, Hkv d] with equal row strides; weights float32; inv_freq float32 [d / 2] or None; tables,
    positions int64 [T].
    """
    H, HKV = q.shape[1] // width, k.shape[1] // width
    assert q.shape[0] < 2 or q.stride(0) == k.stride(0) == v.stride(0)
    _store_qkv[(q.shape[0], 3)](
        q, k, v, q_weight, k_weight, q_weight if inv_freq is None else inv_freq, q_out, tables, positions,
        q.stride(0), q_out.stride(0), layer, eps, rope_scale, H=H, HKV=HKV, D=width,
        BQ=triton.next_power_of_2(H * width), BK=triton.next_power_of_2(HKV * width), ROPE=inv_freq is not None,
        DTYPE=_TYPES[dtype], OVERLAP=overlap, num_warps=16, launch_pdl=overlap)


@triton.jit(do_not_specialize=["first", "layer"])
def _gather(table, out, first, layer, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DTYPE: tl.constexpr):
    page, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    base = tl.multiple_of(tl.load(table + first + page).to(tl.pointer_type(DTYPE)), 16)
    rt, rd = tl.arange(0, PAGE), tl.arange(0, BD)
    tile = rt[:, None] * D + rd[None, :]
    x = tl.load(base + ((layer.to(tl.int64) * 2 + part) * HKV + head) * (PAGE * D) + tile, mask=(rd < D)[None, :],
                other=0.0)
    pages = tl.num_programs(0).to(tl.int64)
    tl.store(out + ((part * HKV + head) * pages + page) * (PAGE * D) + tile, x, mask=(rd < D)[None, :])


def gather_pages(table: Tensor, first: int, count: int, *, layer: int, kv_heads: int, width: int,
                 dtype: torch.dtype) -> Tensor:
    """Keys and values of `count` pages from page `first` of a row's table on: [2, Hkv, count * PAGE, d]."""
    out = torch.empty(2, kv_heads, count * PAGE.value, width, dtype=dtype, device=table.device)
    _gather[(count, kv_heads, 2)](table, out, first, layer, HKV=kv_heads, D=width, BD=triton.next_power_of_2(width),
                                  DTYPE=_TYPES[dtype], num_warps=8)
    return out


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
