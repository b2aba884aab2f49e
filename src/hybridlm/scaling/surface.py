"""L(N, D) = E + A / N^a + B / D^b (Hoffmann et al., arXiv 2203.15556), fitted to one or several arms at once.

N are parameters outside the token tables, D training tokens, L a loss in any unit in which zero means "knows
everything" (nats, bits per byte). Residuals are relative, (model - L) / L, which is the error of log L up to its
square: a loss of 4 and one of 2 count alike. Parameters of the law may be shared between arms; which sharing the data
allow is what `f_test` answers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hybridlm.errors import DataError
from hybridlm.scaling.points import Point
from hybridlm.scaling.varpro import Layout, solve

__all__ = ["NAMES", "FTest", "Fit", "Surface", "f_test", "fit", "held_out_error", "refit", "too_few"]

NAMES = ("E", "A", "a", "B", "b")


@dataclass(frozen=True)
class Surface:
    """The five numbers of one arm; each may also be an array, one entry for each draw of a bootstrap."""

    E: Any
    A: Any
    a: Any
    B: Any
    b: Any

    def loss(self, params: Any, tokens: Any) -> Any:
        """L(N, D)."""
        return self.E + self.A * params**-self.a + self.B * tokens**-self.b

    def tokens_for(self, params: Any, loss: Any) -> Any:
        """D' = (B / (L - E - A / N^a))^(1 / b), tokens at which a model of N parameters has loss L.

        Infinite where no amount of tokens is enough: the loss lies at or under E + A / N^a.
        """
        rest = np.asarray(loss - self.E - self.A * params**-self.a, float)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            tokens = np.where(rest > 0, (self.B / np.where(rest > 0, rest, 1.0)) ** (1 / self.b), np.inf)
        return tokens if tokens.ndim else float(tokens)


@dataclass(frozen=True)
class Fit:
    """What was fitted to what.

    `residuals`: log(L / model), in the order of `points`. `freedom`: points less parameters. `sigma`: the noise of
    log L that the residuals speak of.
    """

    points: tuple[Point, ...]
    surfaces: dict[str, Surface]
    shared: frozenset[str]
    residuals: np.ndarray
    parameters: int
    rss: float
    starts: dict[str, np.ndarray] = field(repr=False, default_factory=dict)  # of refits: log exponents by group

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.surfaces)

    @property
    def freedom(self) -> int:
        return len(self.points) - self.parameters

    @property
    def sigma(self) -> float:
        return float(np.sqrt(self.rss / self.freedom)) if self.freedom > 0 else float("nan")

    def predicted(self) -> np.ndarray:
        """The model's loss at each point, [n]."""
        return np.array([self.surfaces[p.arm].loss(p.params, p.tokens) for p in self.points])


def fit(points: Iterable[Point], shared: Collection[str] = ()) -> Fit:
    """Fit all arms among `points`; `shared` names what they have in common, of E, A, a, B, b; () is separate fits.

    Raises `DataError` when an arm has too few points, or all of one N or one D, for its law to be determined.
    """
    points = tuple(sorted(points, key=lambda p: (p.arm, p.params, p.tokens, p.run)))
    unknown = set(shared) - set(NAMES)
    if unknown:
        raise DataError(f"shared: {', '.join(sorted(unknown))}: not among {', '.join(NAMES)}")
    arms = tuple(dict.fromkeys(p.arm for p in points))
    if not arms:
        raise DataError("no points to fit; give run folders with a decayed end, or a JSON file of points")
    for arm in arms:
        if lacking := too_few([p for p in points if p.arm == arm]):
            raise DataError(f"{arm}: {lacking}")
    loss = np.array([p.loss for p in points])
    draws = refit(_empty(points, arms, frozenset(shared)), loss[None])
    surfaces = {arm: _scalar(s) for arm, s in draws.surfaces.items()}
    done = Fit(points, surfaces, frozenset(shared), np.zeros(0), _parameters(len(arms), shared), 0.0, draws.starts)
    residuals = np.log(loss / done.predicted())
    return replace(done, residuals=residuals, rss=float((residuals**2).sum()))


def too_few(points: Sequence[Point]) -> str:
    """Why an arm's points cannot carry a law, or ""."""
    sizes, lengths = len({p.params for p in points}), len({p.tokens for p in points})
    if sizes >= 3 and lengths >= 3 and len(points) >= 6:
        return ""
    return (f"points {len(points)}, sizes {sizes}, lengths {lengths}; a law of five numbers needs at least 6 points of "
            "3 sizes and 3 lengths")


@dataclass(frozen=True)
class Refit:
    """Many fits of one design: `surfaces` hold arrays [R]."""

    surfaces: dict[str, Surface]
    starts: dict[str, np.ndarray]


def refit(given: Fit, loss: np.ndarray, counts: np.ndarray | None = None) -> Refit:
    """Fit the design of `given` to other losses [R, n], starting from its exponents; `counts` [R, n] repeats points."""
    weight = (np.ones_like(loss) if counts is None else np.sqrt(counts)) / loss
    arm_of = np.array([p.arm for p in given.points])
    # Nothing shared: each arm is a problem of its own. Else all arms are one.
    groups = {"all": given.arms} if given.shared else {arm: (arm,) for arm in given.arms}
    surfaces: dict[str, Surface] = {}
    starts: dict[str, np.ndarray] = {}
    for name, arms in groups.items():
        rows = np.flatnonzero(np.isin(arm_of, arms))
        layout, scale, index = _layout([given.points[i] for i in rows], arms, given.shared)
        target, w = loss[:, rows], weight[:, rows]
        solution = solve(layout, target, w, given.starts.get(name))
        starts[name] = solution.log_exponents
        exponents = np.exp(solution.log_exponents)
        for arm in arms:
            at = {key: columns[arm] for key, columns in index.items()}
            a, b = exponents[:, at["a"]], exponents[:, at["b"]]
            c = solution.coefficients
            surfaces[arm] = Surface(c[:, at["E"]], c[:, at["A"]] * scale[0]**a, a, c[:, at["B"]] * scale[1]**b, b)
    return Refit({arm: surfaces[arm] for arm in given.arms}, starts)


def held_out_error(points: Sequence[Point], shared: Collection[str] = (), by: str = "params") -> dict[str, float]:
    """Fit without the largest N (`by="params"`) or the largest D/N of every size (`by="tokens"`), predict them.

    Returns the root mean square of log(L / predicted) over the points left out, by arm: a figure to hold against the
    noise; much larger means that the law, or the sharing, does not extrapolate.
    """
    key = (lambda p: p.params) if by == "params" else (lambda p: p.tokens / p.params)
    top = {arm: max(key(p) for p in points if p.arm == arm) * (1 - 1e-3) for arm in {p.arm for p in points}}
    if by == "tokens":  # the largest multiple may differ a little between sizes: cut halfway in the logarithm
        top = {arm: value / 2**0.5 for arm, value in top.items()}
    kept = [p for p in points if key(p) < top[p.arm]]
    left = [p for p in points if key(p) >= top[p.arm]]
    surfaces = fit(kept, shared).surfaces
    errors: dict[str, list[float]] = {}
    for p in left:
        errors.setdefault(p.arm, []).append(float(np.log(p.loss / surfaces[p.arm].loss(p.params, p.tokens))) ** 2)
    return {arm: float(np.sqrt(np.mean(e))) for arm, e in sorted(errors.items())}


@dataclass(frozen=True)
class FTest:
    """Whether the data refuse a restriction: `p` small says that arms differ in what was shared."""

    f: float
    p: float
    restrictions: int
    freedom: int


def f_test(restricted: Fit, free: Fit) -> FTest:
    """The F test of a joint fit against one that shares less; both to the same points.

    F = ((RSS_r - RSS) / q) / (RSS / (n - k)) with q restrictions. The coefficients' bound at zero makes it slightly
    conservative where a coefficient ends there.
    """
    q, freedom = free.parameters - restricted.parameters, free.freedom
    if q <= 0 or freedom <= 0:
        raise DataError(f"an F test needs a fit with fewer shared parameters and points to spare; got {q} restrictions "
                        f"and {freedom} degrees of freedom")
    f = max(0.0, (restricted.rss - free.rss) / q) / max(free.rss / freedom, 1e-300)
    return FTest(f, _beta_regularised(freedom / 2, q / 2, freedom / (freedom + q * f)), q, freedom)


def _beta_regularised(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's way)."""
    from math import exp, lgamma, log

    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_regularised(b, a, 1 - x)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(1 - x)) / a
    c, d = 1.0, 1.0 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 300):
        for top in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                    -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d = 1.0 / (1 + top * d)
            c = 1 + top / c
            total *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * total


def _layout(points: Sequence[Point], arms: Sequence[str], shared: Collection[str]) \
        -> tuple[Layout, tuple[float, float], dict[str, dict[str, int]]]:
    """The columns of the problem, the scales of N and D, and which column each arm's number is."""
    params, tokens = np.array([p.params for p in points], float), np.array([p.tokens for p in points], float)
    scale = float(np.exp(np.log(params).mean())), float(np.exp(np.log(tokens).mean()))
    index: dict[str, dict[str, int]] = {}
    for names in (("E", "A", "B"), ("a", "b")):
        free = 0
        for name in names:
            index[name] = {arm: free + (0 if name in shared else i) for i, arm in enumerate(arms)}
            free = max(index[name].values()) + 1
    of = {name: np.array([columns[p.arm] for p in points]) for name, columns in index.items()}
    return Layout(params / scale[0], tokens / scale[1], of["E"], of["A"], of["B"], of["a"], of["b"]), scale, index


def _parameters(arms: int, shared: Collection[str]) -> int:
    return sum(1 if name in shared else arms for name in NAMES)


def _empty(points: tuple[Point, ...], arms: tuple[str, ...], shared: frozenset[str]) -> Fit:
    nothing = Surface(0, 0, 0, 0, 0)
    return Fit(points, dict.fromkeys(arms, nothing), shared, np.zeros(0), 0, 0.0)


def _scalar(surface: Surface) -> Surface:
    return Surface(*(float(getattr(surface, name)[0]) for name in NAMES))
