"""The engine over the float64 operations: slabs, batches, sessions, scores. No native code, no files."""

import itertools
import threading

import numpy as np
import pytest
from tests.engine.helpers import random_config, reference_engine, small_config

from hybridlm.config import FULL, LINEAR, SLIDING
from hybridlm.engine import passes as module
from hybridlm.engine.chat import common_prefix
from hybridlm.engine.passes import _slices
from hybridlm.engine.sampler import log_softmax
from hybridlm.errors import HybridLMError

CLOSE = 2e-5  # the reference rounds states to float32 between passes, logits to float32 at the end


def tokens_of(engine, rng, count):
    return rng.integers(0, engine.config.vocab_size, count).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_reading_in_parts_equals_reading_at_once(seed):
    rng = np.random.default_rng(seed)
    engine = reference_engine(random_config(rng), seed)
    tokens = tokens_of(engine, rng, int(rng.integers(2, 300)))
    whole = engine.logits(tokens)
    cuts = sorted({0, len(tokens), *rng.integers(0, len(tokens) + 1, 4).tolist()})
    session = engine.session()
    for a, b in itertools.pairwise(cuts):
        last = session.prefill(tokens[a:b])
        np.testing.assert_allclose(last, whole[b - 1], atol=CLOSE)
        np.testing.assert_array_equal(session.logits(), last)
    assert session.tokens == tokens and session.position == len(tokens)


def test_long_texts_go_through_in_slabs(monkeypatch):
    rng = np.random.default_rng(1)
    engine = reference_engine()
    tokens = tokens_of(engine, rng, 100)
    whole = engine.logits(tokens)
    monkeypatch.setattr(module, "SLAB", 7)
    monkeypatch.setattr(module, "HEAD_ROWS", 3)
    engine._ops.passes.clear()
    np.testing.assert_allclose(engine.logits(tokens), whole, atol=CLOSE)
    assert engine._ops.passes == [7] * 14 + [2]
    expected = log_softmax(whole[:-1])[np.arange(99), tokens[1:]]
    np.testing.assert_allclose(engine.logprobs(tokens), expected, atol=CLOSE)


@pytest.mark.parametrize("seed", range(6))
def test_sessions_in_a_batch_do_not_touch_each_other(seed, monkeypatch):
    monkeypatch.setattr(module, "SLAB", 16)
    rng = np.random.default_rng(seed)
    engine = reference_engine(random_config(rng), seed)
    texts = [tokens_of(engine, rng, int(rng.integers(1, 90))) for _ in range(5)]
    alone = [engine.logits(t) for t in texts]
    sessions = [engine.session() for _ in texts]
    done = [0] * len(texts)
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        going = [i for i in rng.permutation(len(texts)) if done[i] < len(texts[i])]
        batch = []
        for i in going[:max(1, int(rng.integers(1, 6)))]:
            n = int(rng.integers(1, len(texts[i]) - done[i] + 1))
            batch.append((i, texts[i][done[i]:done[i] + n]))
            done[i] += n
        every = bool(rng.integers(2))
        got = engine.step([(sessions[i], part) for i, part in batch], every=every)
        if every:
            expected = np.concatenate([alone[i][done[i] - len(part):done[i]] for i, part in batch])
        else:
            expected = np.stack([alone[i][done[i] - 1] for i, _ in batch])
        np.testing.assert_allclose(got, expected, atol=CLOSE)


def test_score_is_logprobs_of_each(monkeypatch):
    rng = np.random.default_rng(3)
    engine = reference_engine()
    texts = [tokens_of(engine, rng, n) for n in (1, 2, 300, 2, 17, 1, 40, 5, 5)]
    expected = [log_softmax(engine.logits(t)[:-1])[np.arange(len(t) - 1), t[1:]] for t in texts]
    engine._ops.passes.clear()
    for got, want in zip(engine.score(texts), expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=CLOSE)
    assert len(engine._ops.passes) == 3  # the long one in two, the short ones together
    monkeypatch.setattr(module, "SCORE_BYTES", 1)  # no room for two states: one after the other
    for got, want in zip(engine.score(texts), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=CLOSE)


@pytest.mark.parametrize("kv_type, atol", [("f32", CLOSE), ("f16", 3e-2)])
def test_snapshot_and_restore(kv_type, atol):
    rng = np.random.default_rng(4)
    engine = reference_engine(small_config(layer_types=(LINEAR, SLIDING, FULL), sliding_window=70), kv_type=kv_type)
    tokens, other = tokens_of(engine, rng, 400), tokens_of(engine, rng, 200)
    whole, branch = engine.logits(tokens), engine.logits(tokens[:150] + other)
    session = engine.session()
    session.prefill(tokens[:150])
    mark = session.snapshot()
    before = mark.to_bytes()
    np.testing.assert_allclose(session.prefill(other), branch[-1], atol=atol)
    session.restore(mark)
    assert session.position == 150
    np.testing.assert_allclose(session.logits(), whole[149], atol=atol)
    second = engine.session()
    second.restore(mark)
    np.testing.assert_allclose(session.prefill(tokens[150:]), whole[-1], atol=atol)
    np.testing.assert_allclose(second.prefill(other), branch[-1], atol=atol)
    assert mark.to_bytes() == before


def test_save_and_load_are_exact(tmp_path):
    rng = np.random.default_rng(5)
    engine = reference_engine()
    session = engine.session()
    session.prefill(tokens_of(engine, rng, 130))
    session.save(tmp_path / "talk.state")
    assert [p.name for p in tmp_path.iterdir()] == ["talk.state"]
    rest = tokens_of(engine, rng, 20)
    expected = session.step(rest[0]), session.prefill(rest[1:])
    loaded = engine.session()
    loaded.load(tmp_path / "talk.state")
    got = loaded.step(rest[0]), loaded.prefill(rest[1:])
    np.testing.assert_array_equal(got, expected)

    other = reference_engine(seed=9).session()
    with pytest.raises(HybridLMError, match="another model"):
        other.load(tmp_path / "talk.state")
    with pytest.raises(HybridLMError, match="cannot be read"):
        other.load(tmp_path / "none.state")
    data = bytearray((tmp_path / "talk.state").read_bytes())
    data[-100] ^= 1
    (tmp_path / "talk.state").write_bytes(data)
    position = loaded.position
    with pytest.raises(HybridLMError, match="checksum"):
        loaded.load(tmp_path / "talk.state")
    assert loaded.position == position


def test_an_interrupted_pass_makes_the_session_unusable_and_a_snapshot_saves_it():
    rng = np.random.default_rng(6)
    engine = reference_engine()
    tokens = tokens_of(engine, rng, 50)
    whole = engine.logits(tokens)
    session, bystander = engine.session(), engine.session()
    session.prefill(tokens[:20])
    bystander.prefill(tokens[:20])
    mark = session.snapshot()
    engine._ops.fail_in = 4
    with pytest.raises(KeyboardInterrupt):
        session.prefill(tokens[20:])
    for use in (lambda: session.step(1), session.logits, session.snapshot, lambda: session.save("x"),
                lambda: engine.step([(bystander, [1]), (session, [1])])):
        with pytest.raises(HybridLMError, match="interrupted"):
            use()
    with pytest.raises(HybridLMError, match="interrupted"):
        engine.session().restore(session.state)
    np.testing.assert_allclose(bystander.prefill(tokens[20:]), whole[-1], atol=CLOSE)
    session.restore(mark)
    np.testing.assert_allclose(session.prefill(tokens[20:]), whole[-1], atol=CLOSE)


def test_refusals_name_the_cause_and_change_nothing():
    engine = reference_engine(context=32)
    session = engine.session()
    session.prefill([1, 2, 3])
    for bad, words in (([], "one or more"), ([[1]], "one or more"), ([0.5], "whole numbers"), (["a"], "whole numbers"),
                       ([96], "outside the model's vocabulary of 96"), ([-1], "-1 is outside"),
                       ([1] * 30, "33 tokens do not fit in 32")):
        with pytest.raises(HybridLMError, match=words):
            session.prefill(bad)
        with pytest.raises(HybridLMError, match=words):
            engine.logprobs(bad if len(bad) < 30 else [1] * 34)
    assert session.tokens == [1, 2, 3]
    session.prefill([1] * 29)  # exactly full
    with pytest.raises(HybridLMError, match="do not fit"):
        session.step(1)
    with pytest.raises(HybridLMError, match="twice"):
        engine.step([(session, [1]), (session, [1])])
    with pytest.raises(HybridLMError, match="empty"):
        engine.step([])
    with pytest.raises(HybridLMError, match="nothing yet"):
        engine.session().logits()
    with pytest.raises(HybridLMError, match="another engine"):
        engine.step([(reference_engine().session(), [1])])
    with pytest.raises(HybridLMError, match="another model"):
        session.restore(reference_engine(seed=1).session().snapshot())
    with pytest.raises(HybridLMError, match="no tokenizer"):
        engine.generate("text")
    with pytest.raises(HybridLMError, match="no chat template"):
        engine.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(HybridLMError, match="context"):
        reference_engine(context=0)


def test_threads_take_turns():
    rng = np.random.default_rng(7)
    engine = reference_engine()
    texts = [tokens_of(engine, rng, 40) for _ in range(6)]
    expected = [engine.logits(t)[-1] for t in texts]
    got = [None] * len(texts)

    def read(i):
        session = engine.session()
        for token in texts[i][:-1]:
            session.feed([token])
        got[i] = session.step(texts[i][-1])

    workers = [threading.Thread(target=read, args=(i,)) for i in range(len(texts))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    np.testing.assert_allclose(got, expected, atol=CLOSE)


def test_decode_bytes_per_token_counts_what_moves():
    config = small_config(sliding_window=10, layer_types=(LINEAR, FULL, SLIDING))
    engine = reference_engine(config, kv_type="f16")
    weights = 8 * config.num_parameters() - 8 * config.vocab_size * config.hidden_size  # float64, no input table
    state = 4 * (config.conv_channels * 3 + 2 * 12 * 24)
    row = 2 * 2 * config.kv_heads * config.head_dim  # K and V, f16
    assert engine.decode_bytes_per_token(0) == weights + 2 * state + 2 * row
    assert engine.decode_bytes_per_token(99) == weights + 2 * state + (100 + 10) * row
    tied = reference_engine(config.with_(tie_word_embeddings=True), kv_type="f16")
    assert tied.decode_bytes_per_token(0) == engine.decode_bytes_per_token(0)


def test_slices_cover_all_parts_in_order():
    rng = np.random.default_rng(8)
    for _ in range(50):
        lengths = rng.integers(1, 30, rng.integers(1, 8)).tolist()
        rows = int(rng.integers(1, 20))
        groups = list(_slices(lengths, rows, [0] * len(lengths), 1))
        assert all(sum(b - a for _, a, b in g) == rows for g in groups[:-1])
        assert 0 < sum(b - a for _, a, b in groups[-1]) <= rows
        flat = [(p, t) for g in groups for p, a, b in g for t in range(a, b)]
        assert flat == [(p, t) for p, n in enumerate(lengths) for t in range(n)]
        assert all(len({p for p, _, _ in g}) == len(g) for g in groups)


def test_slices_end_at_multiples_where_sequences_are_cut():
    rng = np.random.default_rng(9)
    for _ in range(200):
        lengths, positions = rng.integers(1, 90, 5).tolist(), rng.integers(0, 40, 5).tolist()
        rows = int(rng.integers(16, 64))
        groups = list(_slices(lengths, rows, positions, 8))
        assert all(0 < sum(b - a for _, a, b in g) <= rows for g in groups)
        flat = [(p, t) for g in groups for p, a, b in g for t in range(a, b)]
        assert flat == [(p, t) for p, n in enumerate(lengths) for t in range(n)]
        assert all((positions[p] + b) % 8 == 0 for g in groups for p, a, b in g if b < lengths[p])


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([1, 5, 3], [1, 2, 3]) == 1
