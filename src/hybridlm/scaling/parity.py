"""Tokens to parity by law: with how many tokens D' one arm's fitted law reaches what another's has at (N, D).

The savings factor is D'/D: 0.625 means the same loss from 62.5% of the tokens, 37.5% fewer, 1.6 times as far on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybridlm.errors import DataError
from hybridlm.scaling.bootstrap import Bootstrap, interval
from hybridlm.scaling.points import Point
from hybridlm.scaling.surface import Fit

__all__ = ["Parity", "inside", "parity", "reach"]


@dataclass(frozen=True)
class Parity:
    """What `parity` found at one place.

    `loss`: the baseline's at (`params`, `tokens`). `tokens_needed`, `factor`: D' and D'/D, infinite if not reachable.
    `low`, `high`: the interval of the factor at `level`. `unreachable`: the share of draws in which no amount of
    tokens was enough. `measured`: whether both arms were measured there; `far`: in words how far outside.
    """

    arm: str
    baseline: str
    params: float
    tokens: float
    loss: float
    tokens_needed: float
    factor: float
    low: float
    high: float
    level: float
    unreachable: float
    measured: bool
    far: str

    @property
    def reachable(self) -> bool:
        return bool(np.isfinite(self.factor))

    @property
    def sign_known(self) -> bool:
        """Whether the interval lies on one side of 1: whether one may say which arm needs fewer tokens."""
        return self.high < 1 or self.low > 1


def parity(fit: Fit, boot: Bootstrap, arm: str, baseline: str, params: float, tokens: float, *,
           own_params: float | None = None, level: float = 0.9) -> Parity:
    """Compare two arms of one fit at N = `params` and D = `tokens` of the baseline.

    Args:
        own_params: N of the arm, where its sizes are not those of the baseline.
    """
    for name in (arm, baseline):
        if name not in fit.surfaces:
            raise DataError(f"{name}: no such arm among the points; there are {', '.join(fit.arms)}")
    own = params if own_params is None else own_params
    target = float(fit.surfaces[baseline].loss(params, tokens))
    needed = float(fit.surfaces[arm].tokens_for(own, target))
    draws = boot.surfaces[arm].tokens_for(own, boot.surfaces[baseline].loss(params, tokens)) / tokens
    low, high = interval(draws, level)
    base_points = [p for p in fit.points if p.arm == baseline]
    own_points = [p for p in fit.points if p.arm == arm]
    measured = inside(base_points, params, tokens) and np.isfinite(needed) and inside(own_points, own, needed)
    return Parity(arm, baseline, params, tokens, target, needed, needed / tokens, low, high, level,
                  float(np.mean(~np.isfinite(draws))), bool(measured), reach(base_points, params, tokens))


def inside(points: Sequence[Point], params: float, tokens: float, slack: float = 0.02) -> bool:
    """Whether (N, D) lies in the convex hull of the points, logarithms taken, or within 2% of it."""
    if params <= 0 or tokens <= 0:
        return False
    place = np.log([params, tokens])
    corners = np.unique(np.log([[p.params, p.tokens] for p in points]), axis=0)
    if len(corners) < 3:
        return bool(len(corners) and np.abs(corners - place).max(axis=1).min() < slack)
    # Inside means: for no direction do all points lie behind. The hull's edges are the only directions to try.
    for i, p in enumerate(corners):
        for q in corners[i + 1:]:
            normal = np.array([p[1] - q[1], q[0] - p[0]])
            normal /= np.linalg.norm(normal)
            side = (corners - p) @ normal
            for sign in (1, -1):
                if (sign * side).max() < 1e-9 and sign * ((place - p) @ normal) > slack:
                    return False
    return True


def reach(points: Sequence[Point], params: float, tokens: float) -> str:
    """How far (N, D) lies outside what the points span: "7.0x the largest N, 38x the most tokens"; "" within it."""
    n, d = [p.params for p in points], [p.tokens for p in points]
    parts = []
    for value, most, least, what, few in ((params, max(n), min(n), "the largest N", "the smallest N"),
                                          (tokens, max(d), min(d), "the most tokens", "the fewest tokens")):
        if value > most * 1.02:
            parts.append(f"{value / most:.3g}x {what}")
        elif value < least / 1.02:
            parts.append(f"1/{least / value:.3g} of {few}")
    return ", ".join(parts)
