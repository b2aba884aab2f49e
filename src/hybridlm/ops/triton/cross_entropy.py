"""Softmax cross-entropy of rows of logits, which become their own gradient in place.

The logits of a chunk of tokens are read twice and written once; a row of a hundred thousand stays in the cache between
the two. `hybridlm.ops.cross_entropy` puts the matrix products around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy_"]

BLOCK = 4096  # columns at a time


@triton.jit
def cross_entropy_kernel(logits_ptr, target_ptr, loss_ptr, stride, z, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    top = float("-inf")
    total = 0.0
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, column < V, other=float("-inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(x, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = above
    logsumexp = top + tl.log(total)
    counts = target >= 0
    picked = tl.load(logits_ptr + target, counts, other=0.0).to(tl.float32)
    loss = logsumexp - picked + z * logsumexp * logsumexp
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    slope = tl.where(counts, 1 + 2 * z * logsumexp, 0.0)
    tl.debug_barrier()  # every lane has read the target's logit before one writes over it
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, column < V, other=float("-inf")).to(tl.float32)
        d = tl.exp(x - logsumexp) * slope - tl.where((column == target) & counts, 1.0, 0.0)
        tl.store(logits_ptr + column, d.to(logits_ptr.dtype.element_ty), column < V)


@torch.library.custom_op("hybridlm::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(logits: Tensor, targets: Tensor, z: float) -> Tensor:
    """-log softmax(row)[target] + z logsumexp(row)^2 of each row, float32 [N]; `logits` [N, V] become the gradient.

    A negative target takes its row out: loss and gradient are zero.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        cross_entropy_kernel[(len(logits),)](logits, targets, losses, logits.stride(0), z, V=logits.shape[1],
                                             BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])), num_warps=8)
    return losses


@cross_entropy_.register_fake
def _(logits, targets, z):
    return torch.empty(len(logits), dtype=torch.float32, device=logits.device)
