"""Cross-entropy over a large vocabulary without holding all its logits.

Logits are the largest array of a training step: a million tokens times a hundred thousand entries. Here they exist for
one chunk of tokens at a time, and forward computes the gradients with them, so that backward has nothing to recompute:
dlogits = softmax - onehot is at hand, and with it d hidden and d weight. The gradient of the weight sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ChunkedCrossEntropy", "token_losses"]

LOGITS = 1 << 27  # that exist at a time

# (hidden [n, D], weight [V, D], targets [n], z-loss weight) -> (sum of losses, d hidden, d weight)
ChunkFunction = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def chunk_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over a chunk of -log p(target) + z * logsumexp^2, and its gradients. [n, D], [V, D], [n]."""
    logits = (hidden @ weight.T).float()
    total = torch.logsumexp(logits, -1, keepdim=True)
    picked = logits.gather(-1, targets[:, None])
    loss = (total - picked + z * total.square()).sum()
    # d loss / d logits = softmax * (1 + 2 z logsumexp) - onehot; the comparison fuses where a scatter would not
    entries = torch.arange(weight.shape[0], device=weight.device)
    slope = torch.exp(logits - total) * (1 + 2 * z * total) - (entries == targets[:, None]).float()
    slope = slope.to(hidden.dtype)
    return loss, slope @ weight, slope.T @ hidden


class ChunkedCrossEntropy(torch.autograd.Function):
    """`apply(hidden [N, D], weight [V, D], targets [N], z, chunk function)` -> the sum of the losses, float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z: float,
                function: ChunkFunction = chunk_gradients) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            low = weight.to(hidden.dtype)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros_like(weight)
            rows = chunk_of(weight)
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                value, d_hidden[part], d_part = function(hidden[part], low, targets[part], z)
                loss += value
                d_weight += d_part
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * slope.to(d_hidden.dtype), d_weight * slope.to(d_weight.dtype), None, None, None


def chunk_of(weight: Tensor) -> int:
    """Tokens of a chunk, a power of two."""
    return 1 << max(0, (LOGITS // weight.shape[0]).bit_length() - 1)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats of each token, float32 [N]; for measuring, not for training."""
    with torch.autocast(hidden.device.type, enabled=False):
        low = weight.to(hidden.dtype)
        losses, rows = [], chunk_of(weight)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ low.T).float()
            losses.append(torch.nn.functional.cross_entropy(logits, targets[part], reduction="none"))
        return torch.cat(losses)
