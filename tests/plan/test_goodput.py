"""The simulator against what can be worked out: closed forms, one failure by hand, bounds of any run."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.plan import Faults, daly, expected_goodput, simulate, young
from hybridlm.plan.goodput import best_interval

INF = math.inf


def test_without_failures_only_checkpoints_cost():
    o = simulate(Faults(INF, interval=100, stall=3), 1000, runs=2)
    assert o.goodput == pytest.approx(1000 / (1000 + 9 * 3))  # none at the very end
    assert (o.failures, o.replayed, o.down, o.error) == (0, 0, 0, 0) and o.stalled == 27
    assert simulate(Faults(INF, interval=INF), 1000, runs=2).goodput == 1


@pytest.mark.parametrize("f", [
    Faults(3600, 300, 10, 0, 0, 0), Faults(3600, 300, 10, 0, 20, 60), Faults(600, 60, 5, 0, 10, 300),
    Faults(10_000, 2_000, 1, 0, 60, 1), Faults(200, 300, 0, 0, 0, 0)])
def test_simulation_agrees_with_the_exact_mean(f):
    o = simulate(f, 3000 * f.mtbf, runs=24, seed=1)
    assert o.error < 0.003
    assert o.goodput == pytest.approx(expected_goodput(f), abs=4 * o.error)
    wall = 3000 * f.mtbf / o.goodput  # all time is work, replay, checkpoints or down
    assert 3000 * f.mtbf + o.replayed + o.stalled + o.down == pytest.approx(wall, rel=1e-6)


def test_a_slow_write_loses_half_an_interval_and_the_write():
    """While failures are rare, one costs detection, restart, and on average interval / 2 + write of work."""
    f = Faults(100_000, 600, 0, 200, 30, 90)
    o = simulate(f, 1e8, runs=16)
    assert o.replayed / o.failures == pytest.approx(600 / 2 + 200, rel=0.05)
    assert o.recovery == pytest.approx(30 + 90 + 600 / 2 + 200, rel=0.05)
    assert o.down / o.failures == pytest.approx(120, rel=0.01)


def test_intervals():
    assert young(10, 3600) == pytest.approx(math.sqrt(72_000))
    assert daly(10, 3600) == pytest.approx(268.33 * (1 + math.sqrt(10 / 7200) / 3 + 10 / 7200 / 9) - 10, rel=1e-4)
    assert daly(8000, 3600) == 3600
    best = max(range(50, 2000, 2), key=lambda i: expected_goodput(Faults(3600, i, 10)))
    assert daly(10, 3600) == pytest.approx(best, rel=0.01)
    found = best_interval(Faults(3600, 0, 10)).interval
    reached = expected_goodput(Faults(3600, found, 10))
    assert reached == pytest.approx(expected_goodput(Faults(3600, best, 10)), rel=3e-3)
    assert best_interval(Faults(3600, 0, 0.01, write=120)).interval >= 120
    assert best_interval(Faults(INF, 0, 1)).interval == INF


@settings(max_examples=60, deadline=None)
@given(mtbf=st.floats(50, 1e5), interval=st.floats(5, 5e3), stall=st.floats(0, 20), write=st.floats(0, 50),
       detect=st.floats(0, 100), restart=st.floats(0, 100), seed=st.integers(0, 99))
def test_any_run_accounts_for_its_time(mtbf, interval, stall, write, detect, restart, seed):
    interval = min(interval, 5 * mtbf)
    f = Faults(mtbf, max(interval, write), stall, write, detect, restart)
    o = simulate(f, 3 * f.interval, runs=3, seed=seed)
    assert 0 < o.goodput <= 1 and o.replayed >= 0
    wall = 3 * f.interval / o.goodput
    assert 3 * f.interval + o.replayed + o.stalled + o.down == pytest.approx(wall, rel=1e-9)
    assert simulate(f, 3 * f.interval, runs=3, seed=seed) == o
    assert simulate(replace(f, mtbf=INF), 3 * f.interval, runs=1).goodput >= o.goodput - 1e-9
