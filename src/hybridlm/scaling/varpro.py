"""Variable projection for sums of power laws: the mathematics under `surface.py`, many data sets at a time.

For given exponents the model is linear in its coefficients, which non-negative least squares finds exactly. So the
search runs over the exponents alone (Golub and Pereyra, 1973; for L(N, D) it is what removes the early stops of
five-parameter fits, arXiv 2603.22339). Here: a grid for the start, then Levenberg-Marquardt steps in the logarithms of
the exponents, each followed by the linear solve. A leading axis R holds data sets that are fitted side by side (the
draws of a bootstrap), so a thousand refits are a few hundred small LAPACK calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Layout", "Solution", "nonnegative", "solve"]

Array = np.ndarray
LOW, HIGH = 0.02, 3.0  # where exponents are looked for


@dataclass(frozen=True)
class Layout:
    """Which coefficient and which exponent each of n points uses; x, y are N and D over their geometric means.

    `e`, `a`, `b`: int [n], the column of the constant, of the N term and of the D term.
    `ea`, `eb`: int [n], the exponent of the N term and of the D term.
    """

    x: Array
    y: Array
    e: Array
    a: Array
    b: Array
    ea: Array
    eb: Array

    @property
    def coefficients(self) -> int:
        return 1 + int(max(self.e.max(), self.a.max(), self.b.max()))

    @property
    def exponents(self) -> int:
        return 1 + int(max(self.ea.max(), self.eb.max()))

    def columns(self, log_exponents: Array) -> Array:
        """The design matrix [R, n, coefficients] of exponents exp([R, exponents])."""
        exponents = np.exp(log_exponents)
        rows = np.arange(len(self.x))
        out = np.zeros((len(exponents), len(rows), self.coefficients))
        out[:, rows, self.e] = 1.0
        out[:, rows, self.a] = self.x ** -exponents[:, self.ea]
        out[:, rows, self.b] = self.y ** -exponents[:, self.eb]
        return out

    def slopes(self, columns: Array, coefficients: Array, log_exponents: Array) -> Array:
        """d model / d log exponent, [R, n, exponents]."""
        exponents = np.exp(log_exponents)
        rows = np.arange(len(self.x))
        out = np.zeros((len(exponents), len(rows), self.exponents))
        for term, index, base in ((self.a, self.ea, self.x), (self.b, self.eb, self.y)):
            value = columns[:, rows, term] * coefficients[:, term]
            out[:, rows, index] += -exponents[:, index] * np.log(base) * value
        return out


@dataclass(frozen=True)
class Solution:
    """`coefficients` [R, p], `log_exponents` [R, q], and `cost` [R], the weighted sum of squares."""

    coefficients: Array
    log_exponents: Array
    cost: Array


def solve(layout: Layout, target: Array, weight: Array, starts: Array | None = None, *, steps: int = 100) -> Solution:
    """Minimise sum (weight * (model - target))^2 over non-negative coefficients and exponents in [0.02, 3].

    Args:
        target: [R, n]; weight: [R, n].
        starts: log exponents [q] or [R, q]; None searches a grid of equal exponents in each data set.
    """
    count = len(target)
    if starts is None:
        starts = _grid(layout, target, weight)
    theta = np.array(np.broadcast_to(starts, (count, layout.exponents)), float)
    coefficients, cost, columns = _project(layout, theta, target, weight)
    damping = np.full(count, 1e-3)
    live = np.arange(count)
    for _ in range(steps):
        wanted = _step(layout, theta[live], coefficients[live], columns[live], target[live], weight[live],
                       damping[live])
        tried = np.clip(theta[live] + np.clip(wanted, -0.7, 0.7), np.log(LOW), np.log(HIGH))
        moved = np.abs(tried - theta[live]).max(axis=1)
        new_coefficients, new_cost, new_columns = _project(layout, tried, target[live], weight[live])
        gain = cost[live] - new_cost
        better = gain > 0
        won = live[better]
        theta[won], coefficients[won], columns[won] = tried[better], new_coefficients[better], new_columns[better]
        small = gain <= 1e-10 * cost[live] + 1e-28
        cost[won] = new_cost[better]
        damping[live] = np.where(better, damping[live] / 5, damping[live] * 4)
        # Done: nothing left to gain, by a step that was tiny or one that was refused however short it got.
        live = live[~((small & better) | (moved < 1e-9) | (damping[live] > 1e8))]
        if not len(live):
            break
    return Solution(coefficients, theta, cost)


def nonnegative(matrix: Array, target: Array) -> Array:
    """Least squares with coefficients >= 0, [p] for a matrix [m, p] (Lawson and Hanson, 1974)."""
    p = matrix.shape[1]
    x, passive = np.zeros(p), np.zeros(p, bool)
    tolerance = 1e-12 * np.abs(matrix).max() * np.abs(target).max()
    for _ in range(3 * p):
        slope = matrix.T @ (target - matrix @ x)
        slope[passive] = -np.inf
        if passive.all() or slope.max() <= tolerance:
            break
        passive[int(slope.argmax())] = True
        for _ in range(p + 1):  # each round sets at least one free
            z = np.zeros(p)
            z[passive] = np.linalg.lstsq(matrix[:, passive], target, rcond=None)[0]
            low = passive & (z <= 0)
            if not low.any():
                break
            x += (z - x) * np.min(x[low] / (x[low] - z[low]))
            passive &= x > 1e-15
            x[~passive] = 0
        x = z
    return x


def _project(layout: Layout, theta: Array, target: Array, weight: Array) -> tuple[Array, Array, Array]:
    """The best coefficients [R, p] for given exponents, their cost [R], and the columns [R, n, p]."""
    columns = layout.columns(theta)
    weighted = columns * weight[..., None]
    norm = np.sqrt((weighted**2).sum(axis=1)) + 1e-300
    goal = weight * target
    # QR of [columns | target]: the triangle is a problem of p rows with the same answer, nothing squared.
    stacked = np.concatenate([weighted / norm[:, None], goal[..., None]], axis=-1)
    triangle = np.asarray(np.linalg.qr(stacked, mode="r"))
    p = layout.coefficients
    matrix, right = triangle[:, :p, :p], triangle[:, :p, p]
    diagonal = np.einsum("rii->ri", matrix)
    diagonal[np.abs(diagonal) < 1e-12] = 1e-12  # equal columns: any split of their coefficient is as good
    x = np.linalg.solve(matrix, right[..., None])[..., 0]
    for r in np.flatnonzero((x < 0).any(axis=1)):
        x[r] = nonnegative(matrix[r], right[r])
    coefficients = x / norm
    residual = goal - np.einsum("rnp,rp->rn", weighted, coefficients)
    return coefficients, (residual**2).sum(axis=1), columns


def _step(layout: Layout, theta: Array, coefficients: Array, columns: Array, target: Array, weight: Array,
          damping: Array) -> Array:
    """The Levenberg-Marquardt step in the log exponents [R, q]; coefficients at zero are held there."""
    slopes = layout.slopes(columns, coefficients, theta)
    free = columns * (coefficients[:, None] > 0)
    jacobian = np.concatenate([free, slopes], axis=-1) * weight[..., None]
    residual = weight * (target - np.einsum("rnp,rp->rn", columns, coefficients))
    scale = np.sqrt((jacobian**2).sum(axis=1))
    scale[scale == 0] = 1.0
    jacobian /= scale[:, None]
    normal = jacobian.transpose(0, 2, 1) @ jacobian
    p, size = columns.shape[-1], jacobian.shape[-1]
    ridge = np.full((len(theta), size), 1e-12)
    ridge[:, p:] += damping[:, None]
    normal[:, np.arange(size), np.arange(size)] += ridge
    dead = np.einsum("rii->ri", normal)
    dead[dead < 1e-6] = 1.0
    step = np.linalg.solve(normal, np.einsum("rns,rn->rs", jacobian, residual)[..., None])[..., 0]
    return np.asarray((step / scale)[:, p:])


def _grid(layout: Layout, target: Array, weight: Array, points: int = 14) -> Array:
    """For each data set the best log exponents of a grid on which all N terms have one exponent and all D terms."""
    values = np.linspace(np.log(0.05), np.log(1.5), points)
    theta = np.zeros((points * points, layout.exponents))
    theta[:, np.unique(layout.ea)] = np.repeat(values, points)[:, None]
    theta[:, np.unique(layout.eb)] = np.tile(values, points)[:, None]
    best = []
    for goal, w in zip(target, weight, strict=True):
        cost = _project(layout, theta, np.broadcast_to(goal, (len(theta), len(goal))), np.broadcast_to(w, (
            len(theta), len(w))))[1]
        best.append(theta[int(cost.argmin())])
    return np.array(best)
