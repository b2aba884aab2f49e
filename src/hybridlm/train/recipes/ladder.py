"""The ladder, `60m` to `1b`, and the transformer-only twin of each rung: one function, sizes as data.

Batch and learning rate follow OLMo-core's model ladder, in N, the weights outside the tables: a batch of
2048 * 160 * (N / 108M)^(2/3) tokens, a learning rate of 0.0047 * (N / 108M)^(-1/3), halved as its hybrid branch does,
warm-up over N tokens, 20 tokens a weight.
"""

from __future__ import annotations

from hybridlm.config import HybridConfig
from hybridlm.train.recipe import Recipe

__all__ = ["RUNGS", "ladder"]

RUNGS = ("60m", "100m", "190m", "370m", "760m", "1b")


def ladder(size: str, *, tokens_per_weight: float = 20.0, sequence: int = 4096) -> Recipe:
    """The recipe of a rung; `size` may end in -twin, which gets its sibling's batch, length and learning rate."""
    weights = HybridConfig.preset(size.removesuffix("-twin")).num_parameters(embedding=False)
    batch = max(8, round(2048 * 160 * (weights / 108e6) ** (2 / 3) / sequence / 8) * 8)
    steps = round(tokens_per_weight * weights / (batch * sequence))
    return Recipe(
        model=HybridConfig.preset(size),
        vocab=100_352,
        steps=steps, batch=batch, microbatch=8, sequence=sequence,
        lr=round(0.5 * 0.0047 * (weights / 108e6) ** (-1 / 3), 6),
        warmup=round(weights / (batch * sequence)), decay=0.1,
        z_loss=1e-5, dtype="bfloat16", compile=True,
        save_every=500, val_every=500, val_tokens=1_000_000,
    )
