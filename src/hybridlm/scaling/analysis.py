"""The whole question in one call: from points and runs to laws, their test, savings factors and how far to trust them.

What `hybridlm scaling` prints and `hybridlm report` draws is this, so the two never differ.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hybridlm.errors import DataError
from hybridlm.scaling.bootstrap import Bootstrap, Kind, bootstrap, interval
from hybridlm.scaling.parity import Parity, parity
from hybridlm.scaling.points import Point, constrained, seed_noise, usable
from hybridlm.scaling.runs import Gathered
from hybridlm.scaling.surface import NAMES, Fit, FTest, f_test, fit, held_out_error, too_few
from hybridlm.scaling.trajectory import Crossing, by_decays, by_phase

__all__ = ["FAR", "JOINT", "Analysis", "Law", "analyse"]

JOINT = ("E", "A", "a", "b")
# Where projections are read when nothing else is asked: the sizes and tokens that one argues about.
FAR = ((7e9, 6e12), (70e9, 15e12))


@dataclass(frozen=True)
class Law:
    """A fit with its intervals, its savings factors by (arm, place), and its error on what it had not seen."""

    fit: Fit
    boot: Bootstrap
    parities: tuple[Parity, ...]
    held_out: dict[str, dict[str, float]]  # "largest N", "largest D/N" -> arm -> rms of log loss

    @property
    def name(self) -> str:
        shared = ", ".join(n for n in NAMES if n in self.fit.shared)
        return f"joint ({shared} shared)" if shared else "separate"


@dataclass(frozen=True)
class Analysis:
    """`joint` and `separate` are None where the points do not suffice; `notes` say why, and what was left out."""

    unit: str
    baseline: str
    arms: tuple[str, ...]
    points: tuple[Point, ...]
    joint: Law | None
    separate: Law | None
    test: FTest | None
    crossings: tuple[Crossing, ...]
    noise: float | None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinities become None."""
        return {
            "unit": self.unit, "baseline": self.baseline, "arms": list(self.arms), "seed_noise": self.noise,
            "points": [{**vars(p), "data_constrained": constrained(p)} for p in self.points],
            "fits": [_law_dict(law) for law in (self.joint, self.separate) if law],
            "test_of_sharing": vars(self.test) if self.test else None,
            "trajectories": [{**vars(c), "factor": c.factor} for c in self.crossings],
            "notes": list(self.notes),
        }


def analyse(found: Gathered, *, baseline: str = "", shared: Collection[str] = JOINT,
            at: Sequence[tuple[float, float]] = (), draws: int = 1000, kind: Kind = "residuals", seed: int = 0,
            level: float = 0.9) -> Analysis:
    """Fit, compare and project.

    Args:
        baseline: the arm that others are held against; "" is "transformer" where there is one, else the first.
        at: places (N, D) of the baseline at which to read savings; the measured sizes come besides, each at the
            most tokens a parameter that it was trained on. () is 7B at 6T and 70B at 15T.
    """
    arms = tuple(dict.fromkeys([*(p.arm for p in found.points), *(r.arm for r in found.runs)]))
    if baseline and baseline not in arms:
        raise DataError(f"{baseline}: no such arm; there are {', '.join(arms)}")
    baseline = baseline or next((a for a in arms if a.startswith(("transformer", "twin"))), arms[0] if arms else "")
    notes = list(found.notes)
    left = [p for p in found.points if constrained(p)]
    if left:
        notes.append(f"{len(left)} of {len(found.points)} points saw their text more than 4 times: shown, not fitted")
    unknown = sum(p.epochs is None for p in found.points)
    if unknown:
        notes.append(f"{unknown} of {len(found.points)} points do not say how often their text was repeated: fitted as "
                     "if it was fresh")
    points = usable(found.points)
    lacking = {arm: too_few([p for p in points if p.arm == arm]) for arm in arms}
    notes += [f"{arm} has no law: {why}" for arm, why in lacking.items() if why]
    enough = [p for p in points if not lacking[p.arm]]
    joint = separate = test = None
    if enough:
        places = [*_measured(enough, baseline), *(at or FAR)]
        separate = _law(enough, (), baseline, places, draws, kind, seed, level)
        if len(separate.fit.arms) > 1 and shared:
            joint = _law(enough, shared, baseline, places, draws, kind, seed, level)
            test = f_test(joint.fit, separate.fit)
    crossings: list[Crossing] = []
    for arm in arms:
        if arm != baseline:
            crossings += by_decays(points, arm, baseline)
            crossings += _phases(found, arm, baseline)
    return Analysis(found.unit, baseline, arms, tuple(found.points), joint, separate, test, tuple(crossings),
                    seed_noise(points), tuple(notes))


def _law(points: Sequence[Point], shared: Collection[str], baseline: str, places: Sequence[tuple[float, float]],
         draws: int, kind: Kind, seed: int, level: float) -> Law:
    done = fit(points, shared)
    boot = bootstrap(done, draws, kind, seed)
    found = tuple(parity(done, boot, arm, baseline, n, d, own_params=_own(points, arm, n), level=level)
                  for arm in done.arms if arm != baseline and baseline in done.arms for n, d in places)
    held = {}
    for by, words in (("params", "largest N"), ("tokens", "largest D/N")):
        try:
            held[words] = held_out_error(points, shared, by)
        except DataError:  # too few left to fit
            continue
    return Law(done, boot, found, held)


def _measured(points: Sequence[Point], baseline: str) -> list[tuple[float, float]]:
    most: dict[float, float] = {}
    for p in points:
        if p.arm == baseline:
            most[p.params] = max(p.tokens, most.get(p.params, 0.0))
    return sorted(most.items())


def _own(points: Sequence[Point], arm: str, params: float) -> float:
    """The arm's own size where it has one within a quarter of `params`: rungs are rarely matched to the parameter."""
    sizes = [p.params for p in points if p.arm == arm]
    near = min(sizes, key=lambda n: abs(np.log(n / params)))
    return near if abs(near / params - 1) <= 0.25 else params


def _phases(found: Gathered, arm: str, baseline: str) -> list[Crossing]:
    out = []
    for theirs in (r for r in found.runs if r.arm == baseline and r.params):
        for ours in (r for r in found.runs if r.arm == arm and r.params):
            same_seed = ours.recipe.get("seed", 0) == theirs.recipe.get("seed", 0)  # hence the same order of text
            if same_seed and abs((ours.params or 1) / (theirs.params or 1) - 1) <= 0.25:
                crossed = by_phase(ours, theirs)
                out += [crossed] if crossed else []
    return out


def _law_dict(law: Law) -> dict[str, Any]:
    surfaces = {}
    for arm, s in law.fit.surfaces.items():
        ends = {n: interval(getattr(law.boot.surfaces[arm], n)) for n in NAMES}
        surfaces[arm] = {n: {"value": getattr(s, n), "low": ends[n][0], "high": ends[n][1]} for n in NAMES}
    return {"name": law.name, "shared": sorted(law.fit.shared), "points": len(law.fit.points), "sigma": law.fit.sigma,
            "rss": law.fit.rss, "parameters": law.fit.parameters, "surfaces": surfaces,
            "bootstrap": {"kind": law.boot.kind, "draws": law.boot.draws}, "held_out_rms": law.held_out,
            "savings": [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in vars(p).items()}
                        for p in law.parities]}
