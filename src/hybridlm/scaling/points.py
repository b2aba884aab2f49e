"""What is fitted: the loss of one model of N parameters after D tokens, at the end of a learning-rate decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["MAX_EPOCHS", "Point", "constrained", "seed_noise", "usable"]

# Repeated text counts nearly like new text up to about four epochs (Muennighoff et al., arXiv 2305.16264).
MAX_EPOCHS = 4.0


@dataclass(frozen=True)
class Point:
    """One decayed model.

    `params`: outside the token tables. `tokens`: trained on, repeats counted. `loss`: nats or bits per byte.
    `epochs`: tokens over unique tokens, None where that is not known. `run`: what names the run it comes from.
    """

    arm: str
    params: float
    tokens: float
    loss: float
    epochs: float | None = None
    run: str = ""


def constrained(point: Point) -> bool:
    """Whether the point has seen its text too often to speak of fresh tokens."""
    return point.epochs is not None and point.epochs > MAX_EPOCHS * (1 + 1e-9)


def usable(points: Iterable[Point]) -> list[Point]:
    """The points that may enter a fit."""
    return [p for p in points if not constrained(p)]


def seed_noise(points: Iterable[Point]) -> float | None:
    """Standard deviation of log loss between runs that differ in the seed alone, pooled; None without such runs."""
    import numpy as np

    cells: dict[tuple[str, float, float], list[float]] = {}
    for p in points:
        cells.setdefault((p.arm, p.params, p.tokens), []).append(float(np.log(p.loss)))
    groups = [np.array(v) for v in cells.values() if len(v) > 1]
    freedom = sum(len(g) - 1 for g in groups)
    if not freedom:
        return None
    return float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom))
