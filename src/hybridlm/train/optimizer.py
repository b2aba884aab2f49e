"""AdamW and Muon in one optimizer, sharded or not, and a step that can be taken back without asking the device.

Muon (Jordan et al., 2024) turns the momentum of each hidden matrix into the nearest orthogonal matrix by Newton-Schulz
iterations; scaled to AdamW's usual size of update (Liu et al., 2025: 0.2 sqrt(max(rows, columns))), it takes the same
learning rate and decay. Tables, norms, gates and convolutions stay with AdamW.

Parameters may be DTensors. AdamW works on each rank's own part; Muon gathers a matrix, and every rank takes its part of
the result. `step` takes `skip`, a tensor on the device: 1 leaves weights, moments and counters as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hybridlm.train.recipe import Recipe
from hybridlm.train.state import local

__all__ = ["HybridOptimizer", "orthogonal", "undecayed"]

# Coefficients of the quintic iteration, tuned for speed (Jordan): singular values end within about 0.7 to 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay would only do harm: norms, gates' A_log and dt_bias, convolutions, the token table."""
    return parameter.ndim < 2 or "conv1d" in name or "embed_tokens" in name


def _on_muon(name: str, parameter: nn.Parameter) -> bool:
    """Hidden matrices: two-dimensional, no table, no head, no convolution's taps."""
    return parameter.ndim == 2 and not any(word in name for word in ("conv1d", "embed_tokens", "lm_head"))


class HybridOptimizer(torch.optim.Optimizer):
    """AdamW over all parameters, or Muon over the hidden matrices and AdamW over the rest, as the recipe says.

    Decayed are all but the `undecayed`; with `recipe.decay_all`, AI2's setting, all but the token table.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in named:
            muon = recipe.optimizer == "muon" and _on_muon(name, p)
            decayed = "embed_tokens" not in name if recipe.decay_all else not undecayed(name, p)
            groups.setdefault((muon, decayed), []).append(p)
        self.betas, self.eps, self.momentum = (recipe.beta1, recipe.beta2), recipe.eps, recipe.momentum
        super().__init__([{"params": groups[key], "muon": key[0], "weight_decay": recipe.weight_decay * key[1]}
                          for key in sorted(groups, reverse=True)],
                         {"lr": recipe.lr, "fused": True})  # counters on the device when loaded

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand; none where `skip`, a float32 scalar on the device, is 1."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for p in params:
                    self._muon(p, group, skip)
            elif params:
                self._adamw(params, group, skip)

    def _adamw(self, params: list[nn.Parameter], group: dict[str, Any], skip: Tensor | None) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in params]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1.0 if skip is None else 1 - skip)
        found = None if skip is None else skip.reshape(1)
        torch._fused_adamw_(
            [local(p) for p in params], [local(p.grad) for p in params if p.grad is not None],
            [local(s["exp_avg"]) for s in states], [local(s["exp_avg_sq"]) for s in states], [], steps,
            lr=group["lr"], beta1=self.betas[0], beta2=self.betas[1], weight_decay=group["weight_decay"],
            eps=self.eps, amsgrad=False, maximize=False, grad_scale=None, found_inf=found)

    def _muon(self, p: nn.Parameter, group: dict[str, Any], skip: Tensor | None) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        assert p.grad is not None
        gradient, momentum, weight = local(p.grad), local(state["momentum"]), local(p)
        keep: Tensor | float = 1.0
        if skip is not None:
            keep = 1 - skip
            gradient = torch.where(skip > 0, torch.zeros_like(gradient), gradient)  # it may hold NaN
        momentum.mul_(1 - (1 - self.momentum) * keep).add_(gradient)
        nesterov = gradient.add(momentum, alpha=self.momentum)
        update = _whole(nesterov, p, orthogonal)
        rate = group["lr"] * keep
        weight.mul_(1 - rate * group["weight_decay"])
        weight.sub_(update.to(weight.dtype) * (0.2 * max(p.shape) ** 0.5 * rate))


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of `matrix` [m, n] = U S V^T, by Newton-Schulz; bfloat16 on a GPU, float32 elsewhere."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _whole(part: Tensor, like: Tensor, function: Any) -> Tensor:
    """`function` of the whole matrix that `part` is this rank's piece of, and of the result this rank's piece."""
    if not isinstance(like, DTensor):
        return function(part)
    whole = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    made = function(whole.full_tensor())
    return distribute_tensor(made.contiguous(), like.device_mesh, like.placements, src_data_rank=None).to_local()
