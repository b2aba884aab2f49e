"""Cross-entropy over a large vocabulary straight from hidden states, without holding all its logits.

Logits are the largest array of a training step: a million tokens times a hundred thousand entries. Here they exist for
one chunk of tokens at a time, and forward turns them into their own gradient in place, so that backward has nothing to
recompute: softmax - onehot is at hand, and with it d hidden and d weight. The gradient of the weight sums in float32,
on a GPU inside the matrix product. Chunks come one after the other, so results are the same on every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.dispatch import on_triton

__all__ = ["cross_entropy_", "linear_cross_entropy"]

LOGITS = {"cuda": 1 << 30, "cpu": 1 << 27}  # that exist at a time


def cross_entropy_(logits: Tensor, targets: Tensor, z: float) -> Tensor:
    """-log softmax(row)[target] + z logsumexp(row)^2 of each row, float32 [N]; `logits` [N, V] become the gradient.

    A negative target takes its row out: loss and gradient are zero.
    """
    if on_triton(logits):
        from hybridlm.ops.triton.cross_entropy import cross_entropy_ as kernel

        return kernel(logits, targets, z)
    wide = logits.float() if logits.dtype != torch.float64 else logits
    counts = targets >= 0
    at = targets.clamp_min(0)[:, None]
    total = torch.logsumexp(wide, -1, keepdim=True)
    losses = (total - wide.gather(-1, at) + z * total.square())[:, 0] * counts
    slope = torch.exp(wide - total).mul_(1 + 2 * z * total)
    slope.scatter_add_(-1, at, slope.new_full(at.shape, -1.0))
    logits.copy_(slope.mul_(counts[:, None]))
    return losses.float()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0) -> Tensor:
    """The sum over tokens of -log softmax(hidden weight^T)[target] + z logsumexp^2, float32; differentiable (once).

    hidden [N, D], weight [V, D] in its own dtype (cast to hidden's for the products; its gradient keeps it), targets
    [N], where a negative one does not count.
    """
    return _linear_cross_entropy(hidden, weight, targets, z)[0]


@torch.library.custom_op("hybridlm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients of hidden and weight."""
    with torch.autocast(hidden.device.type, enabled=False):
        low = weight.to(hidden.dtype)
        losses = []
        d_hidden, d_weight = torch.empty_like(hidden), None
        for part in torch.arange(hidden.shape[0]).split(chunk_rows(hidden.device, weight.shape[0])):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            logits = hidden[rows] @ low.T
            losses.append(cross_entropy_(logits, targets[rows], z).sum())
            torch.mm(logits, low, out=d_hidden[rows])
            d_weight = _add_product(d_weight, logits.T, hidden[rows], weight.dtype)
        return torch.stack(losses).sum(), d_hidden, torch.zeros_like(weight) if d_weight is None else d_weight


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in `dtype`; a wider one than that of a and b reaches into the product's own sums on a GPU."""
    if a.is_cuda and dtype != a.dtype:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype)
    product = (a @ b).to(dtype)
    return product if total is None else total.add_(product)


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Tokens of a chunk, a power of two."""
    return 1 << max(0, (LOGITS.get(device.type, LOGITS["cpu"]) // vocabulary).bit_length() - 1)


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, slope: Tensor, *_: Tensor | None):
    d_hidden, d_weight = ctx.saved_tensors
    return d_hidden * slope.to(d_hidden.dtype), d_weight * slope.to(d_weight.dtype), None, None


_linear_cross_entropy.register_autograd(_gradient, setup_context=_save)
