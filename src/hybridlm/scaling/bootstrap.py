"""Intervals: the fit repeated on data as they might have come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hybridlm.scaling.surface import Fit, Surface, refit

__all__ = ["Bootstrap", "Kind", "bootstrap", "interval"]

Kind = Literal["residuals", "points", "runs"]


@dataclass(frozen=True)
class Bootstrap:
    """`surfaces` hold arrays, one entry a draw; draws of two arms belong together entry by entry."""

    kind: Kind
    draws: int
    surfaces: dict[str, Surface]


def bootstrap(fit: Fit, draws: int = 1000, kind: Kind = "residuals", seed: int = 0) -> Bootstrap:
    """Refit `draws` times.

    Arms are resampled in step: where each has the same design, a draw takes the residuals (or points) of the same
    sizes and lengths from all of them. Noise that arms have in common, because they read the same data in the same
    order, then stays in common and cancels in a ratio as it does in truth.

    Args:
        kind: "residuals" keeps N and D and resamples the errors, scaled up for the parameters they were fitted with;
            "points" resamples points, for errors that are not alike everywhere; "runs" turns the residuals of all
            points of one size by one random factor (a wild cluster bootstrap with Webb's six weights), for points
            along one run, whose errors are not independent.
    """
    rng = np.random.default_rng(seed)
    rows = {arm: np.array([i for i, p in enumerate(fit.points) if p.arm == arm]) for arm in fit.arms}
    sizes = {len(r) for r in rows.values()}
    loss = np.array([p.loss for p in fit.points])
    if kind == "runs":
        signs = _by_size(fit, rows, rng, draws)
        return _done(fit, kind, draws, fit.predicted() * np.exp(_scaled(fit) * signs))
    picks = {arm: rng.integers(0, len(r), (draws, len(r))) for arm, r in rows.items()}
    if len(sizes) == 1:  # the same draw for all arms
        picks = dict.fromkeys(rows, next(iter(picks.values())))
    if kind == "residuals":
        errors, scaled = np.empty((draws, len(loss))), _scaled(fit)
        for arm, r in rows.items():
            errors[:, r] = (scaled[r] - scaled[r].mean())[picks[arm]]
        return _done(fit, kind, draws, fit.predicted() * np.exp(errors))
    counts = np.zeros((draws, len(loss)))
    for arm, r in rows.items():
        for d in range(draws):
            counts[d, r] = np.bincount(picks[arm][d], minlength=len(r))
    return _done(fit, kind, draws, np.broadcast_to(loss, counts.shape), counts)


def interval(values: Any, level: float = 0.9) -> tuple[float, float]:
    """The percentile interval; infinite where so many draws are."""
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def _done(fit: Fit, kind: Kind, draws: int, loss: np.ndarray, counts: np.ndarray | None = None) -> Bootstrap:
    return Bootstrap(kind, draws, refit(fit, loss, counts).surfaces)


def _scaled(fit: Fit) -> np.ndarray:
    """Residuals as large as the noise: a fit takes up its parameters' share of them."""
    return fit.residuals * np.sqrt(len(fit.points) / fit.freedom)


def _by_size(fit: Fit, rows: dict[str, np.ndarray], rng: np.random.Generator, draws: int) -> np.ndarray:
    """Factors [draws, n], one for each size's rank, the same in all arms."""
    weights = np.sqrt([0.5, 1.0, 1.5])
    rank = np.zeros(len(fit.points), int)
    for r in rows.values():
        rank[r] = np.unique([fit.points[i].params for i in r], return_inverse=True)[1]
    picked = rng.choice(np.concatenate([weights, -weights]), (draws, rank.max() + 1))
    return np.asarray(picked[:, rank])
