"""Taking tokens back, and decoding with guesses: the same tokens, in fewer passes. Over the float64 operations."""

import itertools
from collections import Counter

import numpy as np
import pytest
from tests.engine.helpers import random_config, random_tensors, reference_engine, small_config

from hybridlm.engine import Sampler
from hybridlm.engine.layout import PAGE
from hybridlm.engine.speculative import MOST_GUESSES, Lookup, Pace, speculate
from hybridlm.errors import HybridLMError


class AlwaysGuess(Pace):
    def guesses(self, most=MOST_GUESSES):
        return most


@pytest.mark.parametrize("seed", range(8))
def test_taking_back_equals_never_having_read(seed):
    rng = np.random.default_rng(seed)
    engine = reference_engine(random_config(rng), seed)
    vocab = engine.config.vocab_size
    before, after = rng.integers(0, vocab, 120).tolist(), rng.integers(0, vocab, 30).tolist()
    trial = rng.integers(0, vocab, 9).tolist()
    for kept in (0, 1, 4, 9):
        session, other = engine.session(), engine.session()
        session.prefill(before)
        other.prefill(before)
        engine.step([(other, [1]), (session, trial)], trial=True)
        session.take_back(9 - kept)
        assert session.tokens == before + trial[:kept]
        whole = engine.logits(before + trial[:kept] + after)
        np.testing.assert_allclose(session.logits(), whole[119 + kept], atol=2e-5)
        np.testing.assert_allclose(session.prefill(after), whole[-1], atol=2e-5)
        np.testing.assert_allclose(other.logits(), engine.logits([*before, 1])[-1], atol=2e-5)


def test_only_the_last_trial_can_be_taken_back():
    engine = reference_engine()
    session = engine.session()
    session.prefill([1, 2, 3])
    with pytest.raises(HybridLMError, match="no trial"):
        session.take_back(1)
    engine.step([(session, [4, 5])], trial=True)
    for count in (-1, 3):
        with pytest.raises(HybridLMError, match="no trial"):
            session.take_back(count)
    session.take_back(1)
    assert session.tokens == [1, 2, 3, 4]
    engine.step([(session, [5])], trial=True)
    clone = engine.session()
    clone.restore(session.snapshot())  # shares what a page has filled up with: nothing may write there again
    for s in (session, clone):
        with pytest.raises(HybridLMError, match="no trial"):
            s.take_back(1)
    engine.step([(session, [4, 5])], trial=True)
    session.step(6)
    with pytest.raises(HybridLMError, match="no trial"):
        session.take_back(1)
    with pytest.raises(HybridLMError, match="one pass"):
        engine.step([(session, [1] * 300)], trial=True)


def test_a_page_may_be_filled_and_taken_back():
    engine = reference_engine()
    short = PAGE - 4
    tokens = (np.arange(short + 20) % 90).tolist()
    session = engine.session()
    session.prefill(tokens[:short])
    engine.step([(session, [7] * 8)], trial=True)  # fills the first page
    session.take_back(7)
    mark = session.snapshot()
    whole = engine.logits([*tokens[:short], 7, *tokens[short:]])[-1]
    np.testing.assert_allclose(session.prefill(tokens[short:]), whole, atol=2e-5)
    session.restore(mark)
    np.testing.assert_allclose(session.prefill(tokens[short:]), whole, atol=2e-5)


def decode(engine, prompt, count, pace=None, eos=(), draft=None, **options):
    """(tokens, passes) with guesses if there is a pace."""
    session, sampler = engine.session(), Sampler(**options)
    session.feed(prompt)
    engine._ops.passes.clear()
    if pace:
        stream = speculate(session, sampler, prompt, frozenset(eos), pace=pace, draft=draft)
    else:
        stream = plain(session, sampler, prompt)
    tokens = []
    for token in itertools.islice(stream, count):
        assert session.tokens[:len(prompt) + len(tokens)] == prompt + tokens
        tokens.append(token)
    stream.close()
    assert session.tokens == prompt + tokens[:-1], "the state stands where the caller stopped"
    return tokens, len(engine._ops.passes)


def plain(session, sampler, prompt):
    seen = list(prompt)
    while True:
        seen.append(sampler.sample(session.logits(), seen))
        yield seen[-1]
        session.feed(seen[-1:])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pace", [AlwaysGuess, Pace])
def test_the_same_tokens_as_without_guesses(seed, pace):
    rng = np.random.default_rng(seed)
    engine = reference_engine(small_config(vocab_size=6), seed)  # so few tokens repeat themselves all the time
    prompt = rng.integers(0, 6, int(rng.integers(1, 40))).tolist()
    for options in ({"temperature": 0}, {"temperature": 0.6, "seed": seed, "repetition_penalty": 1.1}):
        expected, _ = decode(engine, prompt, 60, **options)
        got, passes = decode(engine, prompt, 60, pace(), **options)
        assert got == expected
        assert passes < 60 or pace is Pace


def test_a_repeating_text_takes_few_passes():
    engine = reference_engine(seed=3)
    prompt = list(range(20)) * 3
    expected, many = decode(engine, prompt, 80, temperature=0)
    got, few = decode(engine, prompt, 80, Pace(), temperature=0)
    assert got == expected and many == 79
    tail = expected[-30:]
    if any(tail[i:] == tail[:-i] for i in range(1, 15)):  # greedy random models end in a loop
        assert few < 50


def next_two(engine, prompt):
    """A session that has read the prompt, and how likely each pair of the next two tokens is."""
    exact: dict[tuple[int, int], float] = {}
    session = engine.session()
    p = Sampler(1.0).probabilities(session.prefill(prompt))
    for a in range(5):
        branch = engine.session()
        branch.restore(session.state)
        q = Sampler(1.0).probabilities(branch.step(a))
        exact.update({(a, b): p[a] * q[b] for b in range(5)})
    return session, exact


def test_sampling_keeps_the_distribution():
    """Over many seeds the second and third token follow the exact joint distribution, with guesses always made."""
    engine = reference_engine(small_config(vocab_size=5), 2)
    prompt = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    session, exact = next_two(engine, prompt)
    count = 2000
    seen: Counter[tuple[int, int]] = Counter()
    start = session.snapshot()
    for seed in range(count):
        session.restore(start)
        stream = speculate(session, Sampler(1.0, seed=seed), prompt, pace=AlwaysGuess())
        seen[(next(stream), next(stream))] += 1
        stream.close()
    chi = sum((seen[k] - count * v) ** 2 / (count * v) for k, v in exact.items() if count * v > 5)
    assert chi < 60  # 24 degrees of freedom: 99.99% at 57


def test_generation_with_guesses_is_generation():
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 4}):
        engine = reference_engine(small_config(vocab_size=8, eos_token_id=5), 1)
        prompt = [0, 1, 2, 3] * 10
        results = []
        for speculative in (False, True):
            engine.cache.clear()
            generation = engine.generate(prompt, max_tokens=70, speculative=speculative, **options)
            results.append((list(generation), generation.finish_reason, generation.tokens))
        assert results[0] == results[1]
    engine = reference_engine(small_config(vocab_size=8), 1, context=64)
    generation = engine.generate(prompt, speculative=True, temperature=0)
    assert len(list(generation)) == 24 and generation.finish_reason == "length"
    assert engine.cache.covered(prompt + generation.tokens) == 63


def test_lookup_finds_the_last_occurrence_and_goes_on_repeating():
    lookup = Lookup((3, 2))
    lookup.extend([1, 2, 3, 9, 1, 2, 3, 7, 5, 2, 3])
    assert lookup.guess(3) == [7, 5, 2]
    lookup.extend([4])
    assert lookup.guess(3) == []
    loop = Lookup((2,))
    loop.extend([8, 1, 2, 3, 1, 2])
    assert loop.guess(7) == [3, 1, 2, 3, 1, 2, 3]
    assert Lookup().guess(3) == []


def test_pace_follows_success():
    pace = Pace()
    assert 0 < pace.guesses() < MOST_GUESSES
    for _ in range(50):
        pace.note(7, 7)
    assert pace.guesses() == MOST_GUESSES and pace.guesses(3) == 3
    for _ in range(50):
        pace.note(0, 7)
    assert pace.guesses() == 0
    skips = 0
    while pace.guesses() == 0:
        pace.skip()
        skips += 1
    assert 10 < skips < 1000


def draft_of(engine, seed, noise):
    """A model like the engine's, its weights moved by noise: right often, not always."""
    rng = np.random.default_rng(seed)
    tensors = random_tensors(engine.config, rng)
    other = random_tensors(engine.config, np.random.default_rng(seed + 1000))
    target = reference_engine(engine.config, tensors=tensors)
    return target, reference_engine(engine.config, tensors={k: v + noise * other[k] for k, v in tensors.items()})


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pace", [AlwaysGuess, None])
def test_a_draft_model_changes_no_token(seed, pace):
    rng = np.random.default_rng(seed)
    engine, draft = draft_of(reference_engine(small_config(vocab_size=int(rng.integers(5, 60)))), seed, 0.05)
    prompt = rng.integers(0, engine.config.vocab_size, int(rng.integers(1, 40))).tolist()
    for options in ({"temperature": 0}, {"temperature": 0.8, "seed": seed, "top_p": 0.9, "repetition_penalty": 1.1}):
        expected, plain_passes = decode(engine, prompt, 60, **options)
        got, passes = decode(engine, prompt, 60, pace() if pace else Pace(), draft=draft, **options)
        assert got == expected
        assert passes < plain_passes


def test_a_draft_that_is_the_model_itself_is_always_right():
    engine, same = draft_of(reference_engine(), 4, 0.0)
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 1}):
        tokens, passes = decode(engine, [1, 2, 3], 65, AlwaysGuess(), draft=same, **options)
        assert len(tokens) == 65 and passes == 8  # the first comes with the prompt, then eight a pass


def test_sampling_with_a_draft_keeps_the_distribution():
    engine, draft = draft_of(reference_engine(small_config(vocab_size=5)), 2, 0.3)
    prompt = [0, 1, 2, 3]
    session, exact = next_two(engine, prompt)
    count, seen, start = 1500, Counter(), session.snapshot()
    for seed in range(count):
        session.restore(start)
        stream = speculate(session, Sampler(1.0, seed=seed), prompt, pace=AlwaysGuess(), most=3, draft=draft)
        seen[(next(stream), next(stream))] += 1
        stream.close()
    chi = sum((seen[k] - count * v) ** 2 / (count * v) for k, v in exact.items() if count * v > 5)
    assert chi < 60  # 24 degrees of freedom: 99.99% at 57


def test_generation_with_a_draft_model():
    engine, draft = draft_of(reference_engine(small_config(vocab_size=8)), 3, 0.05)
    outputs = []
    for speculative in (False, draft):
        engine.cache.clear()
        generation = engine.generate([0, 1, 2, 3] * 5, max_tokens=50, temperature=0.7, seed=2, speculative=speculative)
        list(generation)
        outputs.append(generation.tokens)
    assert outputs[0] == outputs[1]
    with pytest.raises(HybridLMError, match="vocabulary"):
        list(engine.generate([1], max_tokens=5, speculative=reference_engine(small_config(vocab_size=9))))
