"""`Guard`: leaves out the update of a batch whose loss or gradient is out of line (SkipStep, as OLMo-core has it).

A batch is skipped when its loss, or its gradient's norm, lies more than `sigma` deviations above the mean of the last
`window` batches, or is no number. Everything stays on the device: the decision is a tensor that the optimizer reads, so
that a GPU never waits for it. What was skipped still enters the window if it is finite, so that a lasting change of the
loss is got used to; a loss that stays out of line ends the run after `PATIENCE` batches in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["PATIENCE", "Guard"]

PATIENCE = 10  # skipped in a row


class Guard:
    """The window of losses and norms, part of every checkpoint, and the rule.

    Args:
        window: batches looked back on; fewer than half of it, and only what is no number is skipped.
        sigma: deviations above the mean that are too many; 0 skips only what is no number.
    """

    def __init__(self, window: int, sigma: float, device: torch.device) -> None:
        self.window, self.sigma = window, sigma
        self.seen = torch.zeros((2, window), dtype=torch.float64, device=device)  # losses, norms; a ring
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1 where the step is to be skipped, else 0: a float32 scalar on the device. Takes the batch into the window.

        `loss` and `norm` are the global ones, so that all ranks decide alike.
        """
        now = torch.stack([loss.detach(), norm.detach()]).double()
        finite = torch.isfinite(now).all()
        bad = ~finite
        if self.sigma:
            held = self.count.clamp_max(self.window)
            valid = (torch.arange(self.window, device=now.device) < held).double()
            n = held.clamp_min(1).double()
            mean = (self.seen * valid).sum(1) / n
            spread = ((self.seen - mean[:, None]).square() * valid).sum(1).div((n - 1).clamp_min(1)).sqrt()
            enough = self.count >= max(2, self.window // 2)
            bad = bad | (enough & (now > mean + self.sigma * spread).any())
        place = (self.count % self.window).reshape(1)
        kept = self.seen.index_select(1, place)
        self.seen.index_copy_(1, place, torch.where(finite, now[:, None], kept))
        self.count += finite
        self.in_a_row = torch.where(bad, self.in_a_row + 1, 0)
        return bad.float()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain data."""
        return {"seen": self.seen.tolist(), "count": int(self.count), "in_a_row": int(self.in_a_row)}

    def load(self, state: dict[str, Any]) -> None:
        """Take up `state()` of a guard with the same window; another window starts afresh."""
        seen = torch.tensor(state["seen"], dtype=torch.float64)
        if seen.shape == self.seen.shape:
            self.seen.copy_(seen)
            self.count.fill_(state["count"])
            self.in_a_row.fill_(state["in_a_row"])
