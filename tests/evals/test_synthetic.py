"""Synthetic tasks against solvers that read the tokens and know nothing of how they were made."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from hybridlm.evals.synthetic import SYNTHETIC, measure


def parity(tokens):
    return {t: str(tokens[:t + 1]).count("1") % 2 for t in range(len(tokens))}


def modular_arithmetic(tokens):
    text = "".join(str(t) if t < 5 else "+-*"[t - 5] for t in tokens)
    return {t: eval(text[:t + 1]) % 5 for t in range(0, len(tokens), 2)}


def group(name):
    """Permutations as mappings, composed point by point."""
    degree = int(name[1])
    found = [dict(enumerate(p)) for p in permutations(range(degree))]
    if name[0] == "A":
        found = [p for p in found if np.linalg.det(np.eye(degree)[[p[i] for i in range(degree)]]) > 0]

    def solve(tokens):
        points, answers = {i: i for i in range(degree)}, {}
        for t, token in enumerate(tokens):
            points = {i: found[token][p] for i, p in points.items()}
            answers[t] = found.index(points)
        return answers

    return solve


def state_recall(tokens):
    rest = list(tokens)
    bits = [rest.pop(0) for _ in range(next(i for i, t in enumerate(tokens) if t > 1))]
    address = {}
    while rest[0] < 71:
        name, value = rest.pop(0), rest.pop(0) - 7
        address[name] = value
    assert len(set(address.values())) == len(address) == 5
    while rest[0] == 71:
        _, a, b = (rest.pop(0) for _ in range(3))
        assert a != b
        address[a], address[b] = address[b], address[a]
    query, name = rest
    assert query == 72
    return {len(tokens) - 1: bits[address[name]]}


def mqar(tokens):
    known, t = {}, 0
    while t < len(tokens) and tokens[t] and tokens[t] not in known:
        known[tokens[t]] = tokens[t + 1]
        t += 2
    return {i: known[tokens[i]] for i in range(t, len(tokens)) if tokens[i]}


def induction(tokens):
    first = tokens.index(0)
    assert tokens[-1] == 0
    assert tokens.count(0) == 2
    return {len(tokens) - 1: tokens[first + 1]}


def selective_copy(tokens):
    seen = [t for t in tokens if t > 1]
    begin = tokens.index(1)
    assert len(seen) == len(tokens) - begin == 16
    return dict(enumerate(seen, begin))


SOLVERS = {"parity": parity, "modular_arithmetic": modular_arithmetic, "s3": group("S3"), "a5": group("A5"),
           "s5": group("S5"), "state_recall": state_recall, "mqar": mqar, "induction": induction,
           "selective_copy": selective_copy}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_an_independent_solver_gets_every_answer(name):
    task = SYNTHETIC[name]
    for length in (task.train[0], task.train[-1], task.test[-1]):
        batch = task.make(np.random.default_rng(length), 20, length)
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (20, length)
        assert batch.inputs.min() >= 0
        assert max(batch.inputs.max(), batch.targets.max()) < task.vocab
        for i in range(20):
            answers = SOLVERS[name](batch.inputs[i].tolist())
            assert sorted(answers) == np.flatnonzero(batch.mask[i]).tolist()
            assert [answers[t] for t in sorted(answers)] == batch.targets[i][batch.mask[i]].tolist()
        perfect = measure(batch.targets, batch, task.chance)
        assert (perfect.accuracy, perfect.scaled, perfect.sequences) == (1, 1, 1)
        again = task.make(np.random.default_rng(length), 20, length)
        assert (again.inputs == batch.inputs).all()


@pytest.mark.parametrize("name", SYNTHETIC)
def test_guessing_is_at_chance(name):
    task = SYNTHETIC[name]
    batch = task.make(np.random.default_rng(1), 500, task.train[-1])
    answers = batch.targets[batch.mask]
    most = np.bincount(answers).max() / len(answers)  # of the best constant guess
    assert most < task.chance + 0.13
    guess = np.full_like(batch.targets, np.bincount(answers).argmax())
    assert measure(guess, batch, task.chance).accuracy == pytest.approx(most)


def test_moved_is_where_the_start_is_no_answer():
    """Reading the address that a began with is right in all samples that did not move and in half of those that did."""
    task = SYNTHETIC["state_recall"]
    batch = task.make(np.random.default_rng(0), 4000, 81)
    bits = next(i for i, t in enumerate(batch.inputs[0]) if t > 1)
    lazy = np.zeros_like(batch.targets)
    lazy[:, -1] = batch.inputs[np.arange(4000), batch.inputs[:, bits + 1] - 7]
    score = measure(lazy, batch, task.chance)
    moved = batch.subsets["moved"]
    assert 0.6 < moved.mean() < 0.95
    assert score.subsets["moved"] == pytest.approx(0.5, abs=0.05)
    assert score.accuracy == pytest.approx(1 - moved.mean() / 2, abs=0.05)


def test_measure_by_hand():
    batch = SYNTHETIC["parity"].make(np.random.default_rng(0), 4, 8)
    wrong = batch.targets.copy()
    wrong[0, 3] ^= 1
    score = measure(wrong, batch, 0.5)
    assert (score.accuracy, score.sequences) == (31 / 32, 3 / 4)
    assert score.scaled == pytest.approx((31 / 32 - 0.5) / 0.5)
