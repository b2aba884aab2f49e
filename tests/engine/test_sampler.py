"""Samplers against a plain spelling of the rules, and against the frequencies that they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.engine.sampler import Sampler, log_softmax
from hybridlm.errors import HybridLMError


def plainly(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seen=()):
    """The rules of the docstring, one token at a time."""
    x = [float(v) for v in logits]
    for i in set(seen):
        x[i] = x[i] / repetition_penalty if x[i] > 0 else x[i] * repetition_penalty
    if temperature == 0:
        best = max(x)
        return [1.0 if i == x.index(best) else 0.0 for i in range(len(x))]
    p = [math.exp((v - max(x)) / temperature) for v in x]
    p = [v / sum(p) for v in p]
    order = sorted((i for i in range(len(p)) if p[i] > 0), key=lambda i: (-x[i], i))
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        total, kept, mass = sum(p[i] for i in order), [], 0.0
        for i in order:
            kept.append(i)
            mass += p[i] / total
            if mass >= top_p * (1 - 1e-12):
                break
        order = kept
    order = [i for i in order if p[i] >= min_p * max(p[j] for j in order)]
    total = sum(p[i] for i in order)
    return [p[i] / total if i in order else 0.0 for i in range(len(p))]


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 40), spread=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
       temperature=st.sampled_from([0, 0.01, 0.7, 1.0, 5.0]), top_k=st.integers(0, 50),
       top_p=st.sampled_from([0.01, 0.37, 0.9, 1.0]), min_p=st.sampled_from([0.0, 0.1, 1.0]),
       repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]), ties=st.booleans())
def test_probabilities_follow_the_rules(seed, size, spread, ties, **options):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(size) * spread
    if ties:
        logits = np.round(logits)
    logits = logits.astype(np.float32)
    seen = rng.integers(0, size, rng.integers(0, 5)).tolist()
    got = Sampler(**options).probabilities(logits, seen)
    np.testing.assert_allclose(got, plainly(logits, **options, seen=seen), atol=1e-9)
    assert got.sum() == pytest.approx(1)
    assert got[Sampler(**options, seed=seed).sample(logits, seen)] > 0


def test_frequencies_match_the_distribution():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.0])
    sampler = Sampler(temperature=0.8, top_p=0.95, seed=1)
    p = sampler.probabilities(logits)
    n = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=6)
    chi = (((counts - n * p) ** 2)[p > 0] / (n * p[p > 0])).sum()
    assert chi < 25 and counts[p == 0].sum() == 0  # 99.99% of 5 degrees of freedom is at 25.7


def test_a_seed_fixes_the_stream():
    logits = np.random.default_rng(0).standard_normal(1000)
    streams = [[s.sample(logits) for _ in range(20)] for s in (Sampler(seed=3), Sampler(seed=3), Sampler(seed=4))]
    assert streams[0] == streams[1] != streams[2]


def test_greedy_takes_the_smallest_of_equals():
    assert Sampler(0).sample(np.array([1.0, 3.0, 3.0])) == 1
    assert Sampler(0, repetition_penalty=2.0).sample(np.array([1.0, 3.0, 2.9]), [1]) == 2
    assert Sampler(0).probabilities(np.array([1.0, 3.0, 3.0])).tolist() == [0, 1, 0]


def test_huge_logits_and_masked_ones():
    logits = np.array([1e30, -1e30, -np.inf, 0], np.float32)
    assert Sampler(1.0, seed=0).sample(logits) == 0
    assert Sampler(1e-12, seed=0).sample(np.array([0.0, 1e-6])) == 1
    for bad in (np.array([np.nan, 1.0]), np.array([np.inf, 1.0]), np.array([-np.inf]), np.zeros((2, 2)), np.zeros(0)):
        with pytest.raises(HybridLMError, match="logits"):
            Sampler(seed=0).sample(bad)


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", math.nan), ("temperature", "hot"), ("top_k", -1), ("top_k", 1.5), ("top_p", 0),
    ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", math.inf),
    ("seed", -1), ("seed", 1.5)])
def test_settings_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(HybridLMError, match=f"^{name}"):
        Sampler(**{name: value})


def test_log_softmax():
    x = np.random.default_rng(0).standard_normal((3, 50)) * 50
    np.testing.assert_allclose(np.exp(log_softmax(x)).sum(-1), 1)
    np.testing.assert_allclose(log_softmax(x + 1e4), log_softmax(x), atol=1e-9)
