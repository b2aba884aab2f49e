"""The ladder, `60m` to `1b`, and the transformer-only twin of each rung: one function, sizes as data.

Batch and learning rate follow OLMo-core's model ladder, in N, the weights outside the tables: a batch of
2048 * 160 * (N / 108M)^(2/3) tokens, a learning rate of 0.0047 * (N / 108M)^(-1/3), halved as its hybrid branch does,
warm-up over N tokens, 20 tokens a weight, the second beta 0.95 from 524,288 tokens a batch and 0.99 below.

For a scaling study one run of `schedule=wsds decays=0.5,1,2,4` gives a decayed point at each of these multiples of 20
tokens a weight: `steps` must then reach the last (`ladder("190m", multiples=(0.5, 1, 2, 4))` sets both).
"""

from __future__ import annotations

from hybridlm.config import HybridConfig
from hybridlm.train.recipe import Recipe
from hybridlm.train.schedule import ladder_batch, ladder_rate

__all__ = ["RUNGS", "ladder"]

RUNGS = ("60m", "100m", "190m", "370m", "760m", "1b")


def ladder(size: str, *, tokens_per_weight: float = 20.0, sequence: int = 4096,
           multiples: tuple[float, ...] = ()) -> Recipe:
    """The recipe of a rung; `size` may end in -twin, which gets its sibling's batch, length and learning rate.

    With `multiples` it is a WSD-S run that ends at the last of them, counted in `tokens_per_weight`.
    """
    weights = HybridConfig.preset(size.removesuffix("-twin")).num_parameters(embedding=False)
    batch = ladder_batch(weights, sequence)
    steps = round(tokens_per_weight * weights / (batch * sequence) * max(multiples, default=1))
    return Recipe(
        model=HybridConfig.preset(size),
        vocab=100_352,
        steps=steps, batch=batch, microbatch=8, sequence=sequence,
        lr=ladder_rate(weights),
        warmup=round(weights / (batch * sequence)), decay=0.1, beta2=0.95 if batch * sequence >= 1 << 19 else 0.99,
        schedule="wsds" if multiples else "wsd", decays=",".join(f"{m * tokens_per_weight / 20:g}" for m in multiples),
        repetition=32,
        z_loss=1e-5, dtype="bfloat16", compile=True,
        save_every=500, val_every=500, val_tokens=1_000_000,
    )
