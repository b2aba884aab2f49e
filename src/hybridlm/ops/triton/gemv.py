"""Linear layers of a decoding step: few rows, so the weights' way from memory is all that counts.

y^T = W x^T on the tensor cores: W's rows are the tall side of the product, the rows of x, filled up to 16, 32 or 64,
the short one. Multiplying by the filling costs nothing, because the weights arrive later than the products are done.

Which rows are in the batch changes nothing in any of them: each column of the product is summed over K in the same
order, in the same blocks, whatever stands beside it. Narrow layers are split along K so that all processors load; the
parts are added by the program that finishes last, in the order of K, so that too is always the same sum.

SiLU(gate) * up happens where the sums of both are. Many rows go through as well, in larger tiles, with the same sums:
for those who want a row's numbers never to depend on its company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["Workspace", "skinny_linear"]

_SHARED = 224 << 10  # bytes of shared memory for tiles of a program


@triton.jit
def _prefetch(at):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def _sums(w_at, x_at, up_at, here, rows_here, rk, K, first, last, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          GLU: tl.constexpr, EVEN: tl.constexpr):
    """Products over the columns from first to last; with two matrices where GLU."""
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k in range(first, last, BK):
        w_mask, x_mask = here, rows_here
        if not EVEN:
            w_mask, x_mask = here & (k + rk < K)[None, :], rows_here & (k + rk < K)[None, :]
        wt = tl.load(w_at + k, mask=w_mask, other=0.0, eviction_policy="evict_first")
        xt = tl.load(x_at + k, mask=x_mask, other=0.0)
        acc = tl.dot(wt, tl.trans(xt), acc, input_precision="ieee")
        if GLU:
            ut = tl.load(up_at + k, mask=w_mask, other=0.0, eviction_policy="evict_first")
            up = tl.dot(ut, tl.trans(xt), up, input_precision="ieee")
    return acc, up


@triton.jit(do_not_specialize=["rows"])
def _skinny(x, w, y, parts, counters, rows, N, K, share, x_stride, w_stride, y_stride, half,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SERIAL: tl.constexpr,
            GLU: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr):
    block, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rn, rm, rk = block * BN + tl.arange(0, BN), group * BM + tl.arange(0, BM), tl.arange(0, BK)
    here, rows_here = (rn < N)[:, None], (rm < rows)[:, None]
    w_at = w + rn.to(tl.int64)[:, None] * w_stride + rk[None, :]
    x_at = x + rm.to(tl.int64)[:, None] * x_stride + rk[None, :]
    up_at = w_at + half * w_stride
    if OVERLAP:  # the first weights come into the cache while the kernel before this one finishes
        gdc_launch_dependents()
        line = split * share + tl.arange(0, AHEAD) * 64  # 128 bytes each
        at = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * w_stride + tl.minimum(line, K - 1)[None, :]
        _prefetch(at)
        if GLU:
            _prefetch(at + half * w_stride)
        gdc_wait()
    if SERIAL:  # what the splits would add, added here
        acc, up = _sums(w_at, x_at, up_at, here, rows_here, rk, K, 0, min(share, K), BM, BN, BK, GLU, EVEN)
        for part in tl.static_range(1, SPLIT):
            more, more_up = _sums(w_at, x_at, up_at, here, rows_here, rk, K, part * share,
                            min((part + 1) * share, K), BM, BN, BK, GLU, EVEN)
            acc += more
            up += more_up
    else:
        acc, up = _sums(w_at, x_at, up_at, here, rows_here, rk, K, split * share, min((split + 1) * share, K),
                        BM, BN, BK, GLU, EVEN)
    inside = here & (rm < rows)[None, :]
    if SPLIT > 1 and not SERIAL:
        blocks = tl.num_programs(0)
        SIZE: tl.constexpr = BN * BM * (2 if GLU else 1)
        at = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
        at = parts + (group * SPLIT * blocks + block) * SIZE + at
        real = (rm < rows)[None, :]
        tl.store(at + split * blocks * SIZE, acc, mask=real)
        if GLU:
            tl.store(at + split * blocks * SIZE + BN * BM, up, mask=real)
        tl.debug_barrier()
        done = tl.atomic_add(counters + group * blocks + block, 1, sem="acq_rel")
        if done < SPLIT - 1:
            return
        acc = tl.load(at, mask=real, other=0.0, cache_modifier=".cg")
        if GLU:
            up = tl.load(at + BN * BM, mask=real, other=0.0, cache_modifier=".cg")
        for i in range(1, SPLIT):
            acc += tl.load(at + i * blocks * SIZE, mask=real, other=0.0, cache_modifier=".cg")
            if GLU:
                up += tl.load(at + i * blocks * SIZE + BN * BM, mask=real, other=0.0, cache_modifier=".cg")
        tl.store(counters + group * blocks + block, 0)
    out = acc
    if GLU:
        out = acc * tl.sigmoid(acc) * up
    tl.store(y + rm.to(tl.int64)[None, :] * y_stride + rn[:, None], out.to(y.dtype.element_ty), mask=inside)


class Workspace:
    """What split layers leave to each other: partial sums, and counters that every call leaves at zero. One call at a
    time: use one per stream."""

    def __init__(self, device: torch.device | str, floats: int = 1 << 23, tiles: int = 1 << 14) -> None:
        self.parts = torch.empty(floats, dtype=torch.float32, device=device)
        self.counters = torch.zeros(tiles, dtype=torch.int32, device=device)


def skinny_linear(x: Tensor, weight: Tensor, workspace: Workspace, *, glu: int = 0, out: Tensor | None = None,
                  block: tuple[int, int] = (64, 256), split: int = 1, stages: int = 4, overlap: bool = False,
                  ahead: int = 8) -> Tensor:
    """x W^T for x [M, K] and weight [N, K], in x's dtype, accumulated in float32. `out` may have wider rows.

    With `glu` = N the weight is [2 N or more, K], gate above up, and the result SiLU(gate) * up. `block` (rows of W,
    columns) and `split` are the caller's, one choice for each weight: another choice sums in another order. `overlap`:
    start before the kernel that precedes has ended, which needs sm_90; until then `ahead` lines of each row of W are
    fetched into the cache.
    """
    rows, K = x.shape
    N = glu or weight.shape[0]
    if out is None:
        out = torch.empty(rows, N, dtype=x.dtype, device=x.device)
    BN, BK = block
    BM, warps = min(64, max(16, triton.next_power_of_2(rows))), 4
    serial = rows > 64
    if serial:
        BM, BN, BK, warps = 128, 64 if glu else max(BN, 64), 64, 8
    grid = (triton.cdiv(N, BN), 1 if serial else split, triton.cdiv(rows, BM))
    needed = grid[0] * grid[1] * grid[2] * BN * BM * (2 if glu else 1)
    assert split == 1 or serial or needed <= workspace.parts.numel(), "workspace: too small for this product"
    share = triton.cdiv(triton.cdiv(K, block[1]), split) * block[1]  # columns of a split
    tiles = (BN * (2 if glu else 1) + BM) * BK * x.element_size()
    stages = max(1, min(stages, _SHARED // tiles))  # how far loading is ahead changes no sum
    _skinny[grid](x, weight, out, workspace.parts, workspace.counters, rows, N, K, share, x.stride(0), weight.stride(0),
                  out.stride(0), N, BM=BM, BN=BN, BK=BK, SPLIT=split, SERIAL=serial, GLU=glu > 0, EVEN=K % BK == 0,
                  OVERLAP=overlap, AHEAD=ahead, num_warps=warps, num_stages=stages, launch_pdl=overlap)
    return out
