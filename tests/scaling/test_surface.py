"""Fits: exact without noise, at the optimum with it, and the figures that docs/scaling.md gives."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scaling.truth import FACTOR, INSIDE, JOINT, TRUTH, points

from hybridlm.errors import DataError
from hybridlm.scaling import Point, Surface, f_test, fit, held_out_error
from hybridlm.scaling.surface import NAMES, _beta_regularised
from hybridlm.scaling.varpro import Layout, nonnegative, solve


@given(E=st.floats(0.3, 3), A=st.floats(50, 2000), a=st.floats(0.15, 0.7), B=st.floats(50, 3000),
       b=st.floats(0.15, 0.7))
@settings(max_examples=40, deadline=None)
def test_a_law_without_noise_comes_back(E, A, a, B, b):
    truth = Surface(E, A, a, B, b)
    found = fit(points(truth={"x": truth})).surfaces["x"]
    n, d = np.geomspace(6e7, 1e9, 5)[:, None], np.geomspace(6e8, 1.6e11, 5)[None]
    np.testing.assert_allclose(found.loss(n, d), truth.loss(n, d), rtol=1e-6)
    assert found.loss(7e9, 6e12) == pytest.approx(truth.loss(7e9, 6e12), rel=1e-3)


@pytest.mark.parametrize("shared", [(), ("E",), ("E", "A", "a"), ("a", "b"), JOINT, NAMES[:3]])
def test_every_sharing_recovers_the_factor_without_noise(shared):
    s = fit(points(), shared).surfaces
    assert s["hybrid"].tokens_for(1e9, s["transformer"].loss(*INSIDE)) / INSIDE[1] == pytest.approx(FACTOR, rel=1e-6)
    for name in shared:
        assert getattr(s["hybrid"], name) == getattr(s["transformer"], name)


@pytest.mark.parametrize("shared", [(), ("E", "A"), ("a", "b"), JOINT])
def test_no_other_start_finds_a_lower_sum_of_squares(shared):
    """Five hundred random starts of the exponents, and a plain descent that shares no code with the fit."""
    from hybridlm.scaling import surface

    done = fit(points(5e-3, seed=7), shared)
    for name, arms in {"all": done.arms}.items() if shared else {a: (a,) for a in done.arms}.items():
        rows = [p for p in done.points if p.arm in arms]
        layout, _, _ = surface._layout(rows, arms, done.shared)
        loss = np.broadcast_to([p.loss for p in rows], (500, len(rows)))
        starts = np.random.default_rng(1).uniform(np.log(0.05), np.log(1.5), (500, layout.exponents))
        many = solve(layout, loss, 1 / loss, starts)
        best = solve(layout, loss[:1], 1 / loss[:1], done.starts[name])
        assert best.cost[0] <= many.cost.min() * (1 + 1e-9)
        assert np.mean(many.cost < many.cost.min() * (1 + 1e-6)) > 0.95


def test_the_gradient_vanishes_at_the_fit():
    done = fit(points(3e-3, seed=2, truth={"x": TRUTH["hybrid"]}))
    s = done.surfaces["x"]
    n, d = np.array([p.params for p in done.points]), np.array([p.tokens for p in done.points])
    loss = np.array([p.loss for p in done.points])

    def cost(values):
        return float(((Surface(*values).loss(n, d) / loss - 1) ** 2).sum())

    at = [s.E, s.A, s.a, s.B, s.b]
    base = cost(at)
    for i, step in itertools.product(range(5), (1e-4, -1e-4)):
        moved = [v * (1 + step * (i == j)) for j, v in enumerate(at)]
        assert cost(moved) > base


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_nonnegative_least_squares_is_the_best_of_all_supports(seed):
    rng = np.random.default_rng(seed)
    p = int(rng.integers(1, 5))
    matrix, target = rng.standard_normal((7, p)), rng.standard_normal(7)
    x = nonnegative(matrix, target)
    best = float((target**2).sum())
    for support in itertools.chain.from_iterable(itertools.combinations(range(p), k) for k in range(1, p + 1)):
        z = np.linalg.lstsq(matrix[:, support], target, rcond=None)[0]
        if (z >= 0).all():
            best = min(best, float(((target - matrix[:, support] @ z) ** 2).sum()))
    assert (x >= 0).all() and ((target - matrix @ x) ** 2).sum() == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_coefficients_stay_positive_where_the_data_would_have_them_negative():
    law = fit(points(truth={"x": Surface(0.0, 40.0, 0.2, 30.0, 0.2)}, noise=5e-3, seed=4)).surfaces["x"]
    assert min(law.E, law.A, law.B) >= 0


def test_slopes_are_the_derivatives():
    rng = np.random.default_rng(0)
    two = np.array([0, 1, 0, 1])
    layout = Layout(rng.uniform(0.5, 2, 4), rng.uniform(0.5, 2, 4), 0 * two, 1 + two, 3 + two, two, 2 + two)
    theta, c = rng.uniform(-2, 0, (1, 4)), rng.uniform(1, 2, (1, 5))
    exact = layout.slopes(layout.columns(theta), c, theta)[0]
    for j in range(4):
        h = np.zeros((1, 4))
        h[0, j] = 1e-6
        moved = (layout.columns(theta + h) - layout.columns(theta - h)) @ c[0] / 2e-6
        np.testing.assert_allclose(exact[:, j], moved[0], atol=1e-8)


def test_tokens_for_inverts_the_law_and_says_when_it_cannot():
    law = TRUTH["hybrid"]
    d = np.geomspace(1e8, 1e13, 20)
    np.testing.assert_allclose(law.tokens_for(1e9, law.loss(1e9, d)), d, rtol=1e-9)
    assert law.tokens_for(1e9, 1.69) == np.inf


# -- the test of sharing ---------------------------------------------------------------------------------------------


def test_incomplete_beta_on_known_values():
    assert _beta_regularised(1, 1, 0.3) == pytest.approx(0.3, abs=1e-14)
    assert _beta_regularised(2, 3, 0.4) == pytest.approx(0.5248, abs=1e-12)  # a polynomial
    assert _beta_regularised(0.5, 0.5, 0.5) == pytest.approx(0.5, abs=1e-12)
    assert 1 - _beta_regularised(30, 2, 0.9) == pytest.approx(1 - (31 * 0.9**30 - 30 * 0.9**31), abs=1e-12)


def test_f_test_keeps_its_level_and_sees_what_differs():
    def p_values(truth, seeds):
        for seed in seeds:
            data = points(3e-3, seed=seed, truth=truth)
            yield f_test(fit(data, JOINT), fit(data)).p

    true = list(p_values(TRUTH, range(400, 600)))
    assert 0.01 <= np.mean(np.array(true) < 0.05) <= 0.10  # 200 draws: 0.05 +- 3 x 0.015
    other = {**TRUTH, "hybrid": Surface(1.64, 406.4, 0.34, 360.0, TRUTH["hybrid"].b)}
    assert np.median(list(p_values(other, range(20)))) < 0.01


def test_held_out_error_is_the_noise_when_the_law_holds_and_more_when_not():
    data = points(3e-3, seed=5)
    for by in ("params", "tokens"):
        assert all(1e-3 < e < 8e-3 for e in held_out_error(data, JOINT, by).values())
    bent = [Point(p.arm, p.params, p.tokens, p.loss * (1.05 if p.params == 1e9 else 1.0)) for p in data]
    assert all(e > 0.03 for e in held_out_error(bent, JOINT, "params").values())


@pytest.mark.parametrize("data, words", [
    ([], "no points"), (points(sizes=(6e7, 1e8)), "3 sizes"), (points()[:5], "at least 6 points")])
def test_too_little_is_said(data, words):
    with pytest.raises(DataError, match=words):
        fit(data)


def test_unknown_names_are_refused():
    with pytest.raises(DataError, match="not among"):
        fit(points(), ("E", "c"))
