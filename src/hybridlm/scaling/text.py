"""An analysis in words, the same in the terminal and on the page."""

from __future__ import annotations

import math

from hybridlm.scaling.analysis import Analysis, Law
from hybridlm.scaling.parity import Parity

__all__ = ["describe", "factor_words", "size", "tokens"]


def tokens(n: float) -> str:
    """Tokens for people: 850k, 1.2B, 6T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit * 0.9995:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.3g}"


size = tokens  # parameters read alike


def factor_words(p: Parity) -> tuple[str, str, str]:
    """The factor, its interval, and where it was read."""
    factor = f"{p.factor:.3f}" if p.reachable else "not reachable"
    ends = [f"{v:.3f}" if v < 100 else (f"{v:.2g}" if math.isfinite(v) else "inf") for v in (p.low, p.high)]
    where = "measured" if p.measured else "extrapolated" + (f": {p.far}" if p.far else "")
    if p.unreachable:
        where += f"; not reachable in {p.unreachable:.0%} of draws"
    return factor, f"{ends[0]} to {ends[1]}", where


def describe(a: Analysis) -> list[str]:
    """Sentences on what the fits allow to be said, the doubts first."""
    lines = []
    if a.test:
        p = f"F = {a.test.f:.2f} with {a.test.restrictions} and {a.test.freedom} degrees of freedom, p = {a.test.p:.2g}"
        lines.append(f"The sharing is not refused by the data ({p})." if a.test.p >= 0.05 else
                     f"The data refuse the sharing ({p}): read the separate fits, or share less.")
    for law in (a.joint, a.separate):
        if law:
            lines += _doubts(law)
    if a.noise is not None:
        lines.append(f"Runs that differ in the seed alone scatter by {a.noise:.2%} of the loss.")
    return lines


def _doubts(law: Law) -> list[str]:
    lines = []
    if law.held_out:
        told = "; ".join(f"{what}: " + ", ".join(f"{arm} {e:.2%}" for arm, e in errors.items())
                         for what, errors in law.held_out.items())
        lines.append(f"Error on points left out of the {law.name.split()[0]} fit, which has a noise of "
                     f"{law.fit.sigma:.2%}: {told}.")
    blind = [p for p in law.parities if not p.sign_known]
    if blind:
        places = ", ".join(f"{size(p.params)}/{tokens(p.tokens)}" for p in blind)
        lines.append(f"The {law.name.split()[0]} fit cannot tell which arm needs fewer tokens at {places}.")
    far = [p for p in law.parities if not p.measured and p.far]
    if far and law.fit.shared:
        lines.append("Its intervals outside the measured range hold only if the sharing holds there too, which no "
                     "point has tested.")
    return lines
