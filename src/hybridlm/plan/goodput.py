"""Failures, checkpoints and what is left of the time: closed forms, and a simulation where they end.

The machine fails at random with mean `mtbf` (exponential). Every `interval` seconds of work a checkpoint is taken:
training stands still for `stall` (the copy to the host), and the checkpoint counts once it is on disk, `write` seconds
later, while training goes on. A failure is noticed after `detect`, the job is up again after `restart` more, and the
work since the newest checkpoint that counts is done again. A failure during a restart begins it anew.

Goodput is useful work over wall time.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from statistics import mean, median, stdev

__all__ = ["Faults", "Outcome", "best_interval", "daly", "expected_goodput", "simulate", "young"]


@dataclass(frozen=True)
class Faults:
    """Seconds, all of them, of the whole job."""

    mtbf: float  # mean time between failures of the job; inf: none
    interval: float  # of work between checkpoints
    stall: float = 0.0
    write: float = 0.0
    detect: float = 0.0
    restart: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Means over simulated runs; `error` is the standard error of `goodput`."""

    goodput: float
    error: float
    failures: float
    replayed: float  # seconds of work done again
    stalled: float  # seconds in checkpoints
    down: float  # seconds until noticed and up again
    recovery: float  # median seconds from a failure to the first work not done before it


def young(stall: float, mtbf: float) -> float:
    """Young's interval (1974): sqrt(2 C M)."""
    return math.sqrt(2 * stall * mtbf)


def daly(stall: float, mtbf: float) -> float:
    """Daly's higher-order interval (2006), equation 37: work between checkpoints that each cost `stall`."""
    if stall >= 2 * mtbf:
        return mtbf
    x = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def expected_goodput(f: Faults) -> float:
    """The exact mean rate of useful work for checkpoints that count at once (`write` 0).

    A segment of I + C seconds without a failure is needed; failures come at rate 1/M, and each costs the detection D
    and a restart R free of failures. The mean time of a segment is then (M + D) e^(R/M) (e^((I+C)/M) - 1); with D = 0
    that is Daly 2006, equation 20.
    """
    if math.isinf(f.mtbf):
        return f.interval / (f.interval + f.stall)
    try:
        segment = (f.mtbf + f.detect) * math.exp(f.restart / f.mtbf) * math.expm1((f.interval + f.stall) / f.mtbf)
        return f.interval / segment
    except OverflowError:
        return 0.0


def simulate(f: Faults, work: float, *, runs: int = 32, seed: int = 0) -> Outcome:
    """Simulate `runs` runs of `work` seconds; the same seed gives the same numbers.

    The events are failures: between two of them the checkpoints are a matter of division.
    """
    outcomes = [_one(f, work, random.Random(f"{seed}/{i}")) for i in range(runs)]
    walls = [w for w, *_ in outcomes]
    shares = [work / w for w in walls]
    recoveries = [r for *_, times in outcomes for r in times]
    error = stdev(shares) / math.sqrt(runs) if runs > 1 else 0.0
    failures, replayed, stalled, down = (mean(column) for column in zip(*(o[1:5] for o in outcomes), strict=True))
    return Outcome(work / mean(walls), error, failures, replayed, stalled, down, median(recoveries or [0.0]))


def _one(f: Faults, work: float, rng: random.Random) -> tuple[float, int, float, float, float, list[float]]:
    """(wall seconds, failures, replayed, stalled, down, recovery times) of one run."""
    def lasts() -> float:
        return math.inf if math.isinf(f.mtbf) else rng.expovariate(1 / f.mtbf)

    wall = replayed = stalled = down = 0.0
    failures = 0
    saved = 0.0  # work that a checkpoint holds
    furthest = 0.0  # work ever done
    recoveries: list[float] = []
    waiting: list[tuple[float, float]] = []  # (when the failure was, the work to get past)
    cycle = f.interval + f.stall
    while True:
        up = lasts()
        left = work - saved
        whole = max(0, math.ceil(left / f.interval - 1e-9) - 1)  # none is needed at the very end
        needed = left + whole * f.stall
        lived = min(up, needed)
        for at, goal in waiting:  # when is work beyond `goal` first done in this life?
            ahead = max(0.0, goal - saved)
            when = ahead + math.floor(ahead / f.interval) * f.stall
            if when <= lived:
                recoveries.append(wall + when - at)
        waiting = [(at, goal) for at, goal in waiting if
                   max(0.0, goal - saved) + math.floor(max(0.0, goal - saved) / f.interval) * f.stall > lived]
        if up >= needed:
            return wall + needed, failures, replayed + max(0.0, furthest - saved), stalled + whole * f.stall, down, \
                recoveries
        cycles = int(up / cycle)
        done = saved + min(cycles * f.interval + min(up - cycles * cycle, f.interval), left)
        replayed += max(0.0, min(done, furthest) - saved)
        stalled += cycles * f.stall + max(0.0, up - cycles * cycle - f.interval)
        furthest = max(furthest, done)
        landed = int((up - f.write) / cycle) if up >= f.write else 0
        at = wall + up
        wall, failures = at, failures + 1
        waiting.append((at, furthest))
        saved += landed * f.interval
        while True:  # the restart, until one is whole
            wall, down = wall + f.detect, down + f.detect
            ready = lasts()
            if ready >= f.restart:
                wall, down = wall + f.restart, down + f.restart
                break
            wall, down, failures = wall + ready, down + ready, failures + 1


def best_interval(f: Faults) -> Faults:
    """The interval with the most simulated goodput, among Daly's and ones from an eighth to eight times it.

    All candidates meet the same failures, a thousand or so. The cost that Daly's formula asks for is the stall. An
    interval shorter than the time a checkpoint needs to be written would queue, so none is proposed.
    """
    if math.isinf(f.mtbf):
        return replace(f, interval=math.inf)
    start = max(daly(max(f.stall, 1e-3), f.mtbf), f.write, 1.0)
    choices = sorted({max(start * 2.0**(k / 2), f.write, 1.0) for k in range(-6, 7)})
    return max((replace(f, interval=i) for i in choices), key=lambda g: simulate(g, 60 * f.mtbf, runs=16).goodput)
