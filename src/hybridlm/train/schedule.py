"""The learning rate over a run, and the ladder's rules for its peak and the batch.

`wsd`     warm up, stay, fall linearly to `lr_end` over the last `decay` of the run.
`wsds`    several runs in one (WSD-S, as OLMo-core's ladder has it): a decay ends at each multiple of the weights in
          `decays` (tokens a weight over 20: 1 is Chinchilla's), over the last `decay` of the stretch since the one
          before; training then goes on from there at the full rate. One run gives a decayed point at every D.
`cosine`  half a cosine from `lr` to `lr_end`.    `linear`  a line from `lr` to `lr_end`.
"""

from __future__ import annotations

import math

from hybridlm.train.recipe import Recipe

__all__ = ["decay_ends", "ladder_batch", "ladder_rate", "learning_rate"]

CHINCHILLA = 20  # tokens a weight


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The learning rate of a step, `progress` being the share of the run that lies behind it, 0 to 1.

    Warm-up counts steps, the rest follows progress, so that a run bounded by time decays to its end as well.
    """
    progress = min(max(progress, 0.0), 1.0)
    if recipe.schedule == "wsd":
        left = min(1.0, (1 - progress) / recipe.decay) if recipe.decay else 1.0
    elif recipe.schedule == "wsds":
        left = _stretch(recipe, step)
    elif recipe.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = 1 - progress
    warm = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    return recipe.lr * warm * (recipe.lr_end + (1 - recipe.lr_end) * left)


def _stretch(recipe: Recipe, step: int) -> float:
    """What is left of the rate at a step of WSD-S; the last step of a decay still trains a little."""
    begin = 0
    for end in decay_ends(recipe):
        if step < end:
            length = max(1, round(recipe.decay * (end - begin)))
            return min(1.0, (end - step) / length)
        begin = end
    return 0.0


def decay_ends(recipe: Recipe) -> list[int]:
    """The steps at whose end a decay has ended; `recipe.steps` is the last of them."""
    if recipe.schedule != "wsds":
        return [recipe.steps] if recipe.schedule == "wsd" and not recipe.seconds else []
    weights = recipe.model.num_parameters(embedding=False)
    ends = {max(1, round(m * CHINCHILLA * weights / recipe.tokens_per_step)) for m in recipe.multiples}
    return sorted({e for e in ends if e < recipe.steps} | {recipe.steps})


def ladder_batch(weights: int, sequence: int) -> int:
    """Sequences a step of OLMo-core's ladder: 2048 * 160 * (N / 108M)^(2/3) tokens, in eights."""
    return max(8, round(2048 * 160 * (weights / 108e6) ** (2 / 3) / sequence / 8) * 8)


def ladder_rate(weights: int) -> float:
    """The peak learning rate of its hybrid branch: half of 0.0047 * (N / 108M)^(-1/3)."""
    return round(0.5 * 0.0047 * (weights / 108e6) ** (-1 / 3), 6)
