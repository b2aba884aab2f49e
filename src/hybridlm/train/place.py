"""Where a run runs: the device, and how its work is shared out over processes."""

from __future__ import annotations

import torch

from hybridlm.errors import ConfigError
from hybridlm.train.parallel import Layout
from hybridlm.train.recipe import Recipe

__all__ = ["layout_of", "pick_device"]


def layout_of(recipe: Recipe) -> Layout:
    """How the recipe shares the work out over processes."""
    return Layout(replicate=recipe.dp_replicate, shard=recipe.dp_shard, tensor=recipe.tp, context=recipe.cp)


def pick_device(name: str) -> torch.device:
    """The device of a recipe's word."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is none; give auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but PyTorch sees no GPU; give device=cpu")
    return device
