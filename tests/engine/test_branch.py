"""Continuations of shared prefixes against reading each text by itself, and greedy text against one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.helpers import reference_engine, small_config
from tests.text.helpers import byte_level

from hybridlm.engine import branch
from hybridlm.errors import HybridLMError


@pytest.fixture(scope="module")
def engine():
    return reference_engine(small_config(sliding_window=None), cache_bytes=1 << 24)


def alone(engine, context, continuation):
    """From the logits of the one text."""
    x = engine.logits([*context, *continuation])[len(context) - 1:-1].astype(np.float64)
    logprobs = x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
    rows = np.arange(len(continuation))
    return logprobs[rows, continuation].sum(), bool((x.argmax(1) == continuation).all())


@st.composite
def requests(draw):
    """Contexts that share beginnings of many lengths, continuations that repeat, one being the beginning of another."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    stem = rng.integers(0, 96, draw(st.integers(1, 60))).tolist()
    found = []
    for _ in range(draw(st.integers(1, 12))):
        cut = draw(st.integers(1, len(stem)))
        context = stem[:cut] + rng.integers(0, 96, draw(st.integers(0, 12))).tolist()
        continuation = rng.integers(0, 3, draw(st.integers(1, 6))).tolist()
        found.append((context, continuation))
        if draw(st.booleans()):
            found.append((context, continuation[:1]))
        if draw(st.booleans()):
            found.append((context + continuation, [1]))
    return found


@settings(deadline=None, max_examples=60)
@given(requests())
def test_as_if_each_text_were_read_alone(engine, asked):
    for (context, continuation), (logprob, greedy) in zip(asked, engine.continuations(asked), strict=True):
        wanted, best = alone(engine, context, continuation)
        assert logprob == pytest.approx(wanted, abs=1e-4)
        assert greedy == best


def test_greedy_continuations_are_recognised(engine):
    prompt = [5, 6, 7]
    written = [p.token for p in engine.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True)]
    wrong = [*written[:3], (written[3] + 1) % 96]
    found = engine.continuations([(prompt, written), (prompt, wrong)])
    assert [greedy for _, greedy in found] == [True, False]


def test_shared_tokens_are_read_once(engine, monkeypatch):
    """A preamble of 100 tokens, ten questions of 30, four answers of one token and two of 3: counted rows of passes."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(0, 96, 100).tolist()
    asked = []
    for _ in range(10):
        context = [*preamble, *rng.integers(0, 96, 30).tolist()]
        asked += [(context, [i]) for i in range(4)] + [(context, [50 + i, 1, 2]) for i in range(2)]
    read, heads = [], []
    run, logits = engine._passes._run, branch.logits
    monkeypatch.setattr(engine._passes, "_run", lambda parts, trial: (read.extend(len(ids) for _, ids in parts),
                                                                      run(parts, trial))[1])
    monkeypatch.setattr(branch, "logits", lambda w, o, rows: (heads.append(len(rows)), logits(w, o, rows))[1])
    first = engine.continuations(asked, prefix=100)
    assert sum(read) == 100 + 10 * (30 + 2 * 2)  # a branch of two tokens is not worth a node of its own
    assert sum(heads) == 10 * (1 + 2 * 2)
    read.clear()
    again = engine.continuations(asked, prefix=100)
    assert sum(read) == 10 * (30 + 2 * 2)
    assert again == first  # to the last bit
    np.testing.assert_allclose([p for p, _ in engine.continuations(asked)], [p for p, _ in first], atol=1e-4)


def test_greedy_text_side_by_side(tmp_path):
    from tests.cli.micro import write_micro

    from hybridlm.engine import Engine
    from hybridlm.formats.convert import convert

    write_micro(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf", "f32")
    tokens = byte_level()
    with Engine.open(tmp_path / "m.gguf", exact=True, kv_type="f32") as engine:
        prompts = [tokens.encode(f"the shared beginning and {i} " + "x" * i) for i in range(20)]
        prefix = len(tokens.encode("the shared"))
        assert all(p[:prefix] == prompts[0][:prefix] for p in prompts)
        whole = [engine.generate(p, max_tokens=12, temperature=0) for p in prompts]
        texts = ["".join(piece.text for piece in g) for g in whole]
        assert engine.generate_until(prompts, 12, (), prefix) == texts
        stop = texts[3][2:4] or "e"
        cut = [t.split(stop)[0] for t in texts]
        assert engine.generate_until(prompts, 12, (stop,)) == cut
        with pytest.raises(HybridLMError, match="do not fit"):
            engine.generate_until([prompts[0]], 1000)
