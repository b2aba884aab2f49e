"""`tiny`: a first run on a laptop, minutes on two cores."""

from __future__ import annotations

from hybridlm.config import HybridConfig
from hybridlm.train.recipe import Recipe

__all__ = ["tiny"]


def tiny() -> Recipe:
    """A hybrid of about a million weights beside its table of 4,096 tokens."""
    return Recipe(
        model=HybridConfig.preset("tiny"),
        vocab=4096,
        steps=600, batch=8, sequence=256,
        lr=4e-3, warmup=20,
        save_every=100, val_every=100, val_tokens=50_000,
    )
