"""AdamW and the learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from hybridlm.train.recipe import Recipe

__all__ = ["adamw", "learning_rate", "undecayed"]


def undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay would only do harm: norms, gates' A_log and dt_bias, convolutions, the token table."""
    return parameter.ndim < 2 or "conv1d" in name or "embed_tokens" in name


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over two groups of parameters, decayed and not, in the order of their names."""
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    groups = [
        {"params": [p for n, p in named if not undecayed(n, p)], "weight_decay": recipe.weight_decay},
        {"params": [p for n, p in named if undecayed(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=(recipe.beta1, recipe.beta2),
                             eps=recipe.eps, fused=True)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The learning rate of a step, `progress` being the share of the run that lies behind it, 0 to 1.

    Warm-up counts steps, the rest follows progress, so that a run bounded by time decays to its end as well.
    """
    progress = min(max(progress, 0.0), 1.0)
    if recipe.schedule == "wsd":
        left = min(1.0, (1 - progress) / recipe.decay) if recipe.decay else 1.0
    elif recipe.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = 1 - progress
    warm = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    return recipe.lr * warm * (recipe.lr_end + (1 - recipe.lr_end) * left)
