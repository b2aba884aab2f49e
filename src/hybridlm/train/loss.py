"""The loss of each token, for measuring. Training takes `hybridlm.ops.linear_cross_entropy`, which has gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops.cross_entropy import chunk_rows

__all__ = ["token_losses"]


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats of each token, float32 [N], from hidden [N, D] and weight [V, D], in chunks."""
    with torch.autocast(hidden.device.type, enabled=False):
        low = weight.to(hidden.dtype)
        losses, rows = [], chunk_rows(hidden.device, weight.shape[0]) // 4 or 1  # of float32 logits, and their softmax
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ low.T).float()
            losses.append(F.cross_entropy(logits, targets[part], reduction="none"))
        return torch.cat(losses)
