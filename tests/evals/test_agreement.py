"""Agreement against sums made by hand, faults that it must find, and the paths of a real engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.helpers import reference_engine, small_config

from hybridlm.errors import DataError
from hybridlm.evals import paths
from hybridlm.evals.agreement import Budget, Path, compare, divergences

LOOSE = Budget(1e9, 1e9, 0.0)


def table(logits, blocks):
    """A path that gives rows of one array in blocks of the given lengths, over and over."""
    def rows(tokens):
        at, i = 0, 0
        while at < len(tokens):
            n = min(blocks[i % len(blocks)], len(tokens) - at)
            yield logits[at:at + n]
            at, i = at + n, i + 1
    return Path(f"blocks {blocks}", rows)


def by_hand(a, b):
    p = np.exp(a.astype(np.float64)) / np.exp(a.astype(np.float64)).sum(1, keepdims=True)
    q = np.exp(b.astype(np.float64)) / np.exp(b.astype(np.float64)).sum(1, keepdims=True)
    return (p * np.log(p / q)).sum(1)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(2, 40), st.lists(st.integers(1, 70), min_size=1, max_size=4),
       st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 1000))
def test_sums_by_hand_whatever_the_blocks(length, vocab, first, second, seed):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((length, vocab)).astype(np.float32) * 3
    b = a + rng.standard_normal(a.shape).astype(np.float32)
    found = compare(table(a, first), table(b, second), [np.zeros(length)], LOOSE)
    kl = by_hand(a, b)
    assert found.rows == length
    assert found.mean_kl == pytest.approx(kl.mean())
    assert (found.max_kl, found.worst) == (pytest.approx(kl.max()), (0, int(kl.argmax())))
    same = a.argmax(1) == b.argmax(1)
    margin = np.sort(a, 1)[:, -1] - np.sort(a, 1)[:, -2]  # of logits and of log-probabilities alike
    assert found.top1 == pytest.approx(same.mean())
    assert found.clear == (margin > 0.1).sum()
    assert found.clear_same == (same & (margin > 0.1)).sum()
    for octave in found.octaves:
        part = kl[octave.first:octave.last]
        assert octave.rows == len(part)
        assert octave.mean_kl == pytest.approx(part.mean())
    assert sum(o.rows for o in found.octaves) == length
    json.dumps(found.to_dict(), allow_nan=False)


def test_several_texts_and_the_worst_one():
    a = np.zeros((5, 3), np.float32)
    b = a.copy()
    b[3, 1] = 4

    def other(tokens):
        yield b[:len(tokens)] if tokens[0] else a[:len(tokens)]

    found = compare(table(a, [2]), Path("other", other), [np.zeros(5), np.ones(5)], LOOSE)
    assert found.rows == 10
    assert found.worst == (1, 3)


@pytest.mark.parametrize("fault", ["one", "nan", "inf", "drift", "swapped"])
def test_a_fault_breaks_the_budget(fault):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((2048, 50)).astype(np.float32)
    b = a + 1e-4 * rng.standard_normal(a.shape).astype(np.float32)
    budget = Budget(1e-6, 1e-5)
    assert compare(table(a, [256]), table(b, [256]), [np.zeros(2048)], budget).broken == []
    words = {"one": "max KL", "nan": "1 positions with NaN", "inf": "1 positions with NaN", "drift": "last octave",
             "swapped": "top-1"}
    if fault == "drift":
        b += (3e-6 * np.arange(2048)[:, None] * rng.standard_normal(a.shape)).astype(np.float32)
        budget = Budget(2e-5, 1, growth=3)
    else:
        row = 1500
        top = a[row].argmax()
        b[row, 7] = {"nan": np.nan, "inf": np.inf}.get(fault, a[row, top] + 1)
        budget = Budget(1, 1) if fault == "swapped" else budget
    found = compare(table(a, [256]), table(b, [100]), [np.zeros(2048)], budget)
    assert any(words[fault] in line for line in found.broken), found.broken
    assert not found.passed
    if fault in ("one", "nan", "inf"):
        assert found.worst == (0, 1500)
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_cannot_be_compared():
    a, b = np.zeros((4, 3), np.float32), np.zeros((4, 5), np.float32)
    with pytest.raises(DataError, match="vocabularies of 3 and 5"):
        compare(table(a, [4]), table(b, [4]), [np.zeros(4)], LOOSE)
    with pytest.raises(DataError, match="rows in common"):
        compare(table(a, [4]), Path("short", lambda tokens: iter([a[:2]])), [np.zeros(4)], LOOSE)
    with pytest.raises(DataError, match="no tokens"):
        compare(table(a, [4]), table(a, [4]), [], LOOSE)


def test_extreme_logits():
    kl, margin = divergences(np.float32([[1e30, 0, -1e30], [3, 3, 3]]), np.float32([[1e30, 0, -1e30], [3, 3, 3]]))
    assert kl.tolist() == [0, 0]
    assert margin[1] == 0


def test_every_path_of_an_engine_agrees():
    engine = reference_engine(small_config(max_position_embeddings=1024))
    text = np.random.default_rng(1).integers(0, 96, 300)
    for reference, other, _ in paths.pairs_of(engine, paths.EXACT):
        if "saved" not in other.name:  # float64 state does not fit the layout's bytes
            found = compare(reference, other, [text], paths.EXACT)
            assert found.passed, (other.name, found.broken)
            assert found.rows == 300


def test_a_path_that_forgets_is_found():
    """An engine whose pieces do not go on from each other: what a lost state looks like."""
    engine = reference_engine(small_config())

    def rows(tokens):
        for at in range(0, len(tokens), 64):
            yield engine.step([(engine.session(), tokens[at:at + 64])], every=True)

    text = np.random.default_rng(1).integers(0, 96, 200)
    found = compare(paths.whole(engine), Path("forgets", rows), [text], paths.EIGHT_BIT)
    assert not found.passed
    assert found.worst[1] >= 64
