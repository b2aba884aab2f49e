"""Tokens to parity by trajectory: where one run's curve crosses what another run reached, without any law.

Losses compare only in the same phase of the learning rate: a decay lowers the loss by itself, so a decayed end against
a curve in mid-flight makes the other look slow. Two comparisons are fair:

    "decays"      ends of decays (WSD-S) against ends of decays, between them interpolated in log tokens and log loss
    "same phase"  both on the plateau of their schedule, curves smoothed, the last crossing counts

A cosine or linear schedule has no plateau and one end; its curves are compared too, and marked biased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybridlm.scaling.points import Point
from hybridlm.scaling.runs import Run

__all__ = ["Crossing", "by_decays", "by_phase", "crossing", "plateau", "smooth"]


@dataclass(frozen=True)
class Crossing:
    """`factor` is D'/D; None where the arm does not reach `loss` (or was below it from its first point on).

    `how`: "decays" or "same phase". `note` says why there is no factor, or what is wrong with it.
    """

    arm: str
    baseline: str
    params: float
    tokens: float
    loss: float
    tokens_needed: float | None
    how: str
    note: str = ""

    @property
    def factor(self) -> float | None:
        return None if self.tokens_needed is None else self.tokens_needed / self.tokens


def by_decays(points: Sequence[Point], arm: str, baseline: str, *, tolerance: float = 0.25) -> list[Crossing]:
    """Each decayed point of the baseline against the decayed points of the arm's size nearest to it.

    Sizes further apart than `tolerance` (relative) are not compared. Runs that differ in the seed are averaged.
    """
    theirs, ours = (_by_size([p for p in points if p.arm == name]) for name in (baseline, arm))
    out = []
    for params, (tokens, losses) in theirs.items():
        near = min(ours, key=lambda n: abs(np.log(n / params)), default=None)
        if near is None or abs(near / params - 1) > tolerance:
            continue
        for d, loss in zip(tokens, losses, strict=True):
            needed, note = _between(*ours[near], float(loss))
            out.append(Crossing(arm, baseline, params, float(d), float(loss), needed, "decays", note))
    return out


def by_phase(run: Run, baseline: Run, *, window: float = 0.05) -> Crossing | None:
    """The plateaus of two runs; None where they share no key or have no plateau. `window`: see `smooth`."""
    key = "val_bits_per_byte" if min(len(plateau(r, "val_bits_per_byte")[0]) for r in (run, baseline)) >= 8 else "loss"
    biased = next((r.schedule for r in (run, baseline) if r.schedule in ("cosine", "linear")), "")
    curves = [r.series(key) if biased else plateau(r, key) for r in (run, baseline)]
    if min(len(tokens) for tokens, _ in curves) < 4:
        return None
    (own_tokens, own), (tokens, losses) = ((t, smooth(t, v, window)) for t, v in curves)
    if biased:  # what the baseline's end has gained by its decay, the other curve has not had yet
        note = f"biased: {biased} schedule, the ends are decayed and the curves before them are not"
    else:
        note = "" if key == "val_bits_per_byte" else "by training loss"
    needed = crossing(own_tokens, own, float(losses[-1]))
    if needed is None:
        note = "not reached within the run" + (f"; {note}" if note else "")
    return Crossing(run.arm, baseline.arm, baseline.params or 0.0, float(tokens[-1]), float(losses[-1]), needed,
                    "same phase", note)


def plateau(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of the records at the peak learning rate, up to the first decay."""
    rate = run.columns.get("lr")
    if rate is None or not len(rate):
        return np.zeros(0), np.zeros(0)
    high = rate >= 0.999 * np.nanmax(rate)
    start = int(high.argmax())
    fallen = np.flatnonzero(~high[start:])
    stop = start + int(fallen[0]) if len(fallen) else len(rate)
    tokens, values = run.series(key)
    held = (tokens >= run.tokens[start]) & (tokens <= run.tokens[stop - 1])
    return tokens[held], values[held]


def smooth(tokens: np.ndarray, values: np.ndarray, window: float = 0.05) -> np.ndarray:
    """For each record the mean log loss over those within +-`window` of its tokens; as many on each side."""
    if not len(tokens):
        return values
    logs = np.log(values)
    sums = np.concatenate([[0.0], np.cumsum(logs)])
    low = np.searchsorted(tokens, tokens * (1 - window), "left")
    high = np.searchsorted(tokens, tokens * (1 + window), "right")
    place = np.arange(len(tokens))
    side = np.minimum(place - low, high - 1 - place)  # centred, so that a slope does not shift the mean
    return np.asarray(np.exp((sums[place + side + 1] - sums[place - side]) / (2 * side + 1)))


def crossing(tokens: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """Tokens from which on the curve stays at or under `target`, between records log-linear; None if it never does."""
    above = np.flatnonzero(values > target)
    if not len(above):
        return float(tokens[0]) if len(tokens) else None
    i = int(above[-1])
    if i == len(values) - 1:
        return None
    return _interpolate(tokens[i], values[i], tokens[i + 1], values[i + 1], target)


def _between(tokens: np.ndarray, values: np.ndarray, target: float) -> tuple[float | None, str]:
    if values[0] < target:
        return None, "already lower at its first decay"
    needed = crossing(tokens, values, target)
    return (needed, "") if needed is not None else (None, "not reached by its last decay")


def _interpolate(t0: float, v0: float, t1: float, v1: float, target: float) -> float:
    share = np.log(v0 / target) / np.log(v0 / v1)
    return float(np.exp(np.log(t0) + share * np.log(t1 / t0)))


def _by_size(points: Sequence[Point]) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Size -> (tokens ascending, mean losses)."""
    cells: dict[float, dict[float, list[float]]] = {}
    for p in points:
        cells.setdefault(p.params, {}).setdefault(p.tokens, []).append(p.loss)
    return {n: (np.array(sorted(c)), np.array([np.mean(c[d]) for d in sorted(c)])) for n, c in sorted(cells.items())}
