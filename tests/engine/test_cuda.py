"""The GPU engine, on PyTorch's CPU tensors where no GPU is needed: against float64, and in every use of a state."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.device import device_engine
from tests.engine.helpers import random_config, random_tensors, reference_engine, small_config, write_gguf

from hybridlm.config import HybridConfig
from hybridlm.engine import Engine, Sampler
from hybridlm.engine.cuda_open import open_engine, random_engine
from hybridlm.engine.layout import PAGE
from hybridlm.engine.scheduler import Scheduler
from hybridlm.engine.writer import Writer
from hybridlm.errors import FormatError, HybridLMError

ROOT = Path(__file__).parents[2]
CLOSE = 2e-4  # of logits of order one: float32 against float64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens_of(engine, rng, n):
    return rng.integers(0, engine.config.vocab_size, n).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_equals_float64_on_random_models(seed):
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    tensors = random_tensors(config, rng)
    engine, reference = device_engine(config, tensors=tensors), reference_engine(config, tensors=tensors)
    texts = [tokens_of(engine, rng, int(n)) for n in rng.integers(1, 200, 3)]
    for text in texts:
        np.testing.assert_allclose(engine.logits(text), reference.logits(text), atol=5 * CLOSE)
    a, b = ([e.session() for _ in texts] for e in (engine, reference))
    for pieces in ([t[:len(t) // 2 + 1] for t in texts], [[1], [2], [3]], [[4, 5, 6], [7], [8, 9]]):
        np.testing.assert_allclose(engine.step(list(zip(a, pieces, strict=True))),
                                   reference.step(list(zip(b, pieces, strict=True))), atol=5 * CLOSE)


def test_kernels_in_the_interpreter():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, ROOT / "tests/engine/interpret_engine.py"], capture_output=True, text=True,
                          env=environment, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 2 and max(errors.values()) < CLOSE, errors


def test_long_texts_are_cut_at_multiples_of_64():
    """Cut there, or read in such parts, the sums are the same in every bit."""
    rng = np.random.default_rng(1)
    engine, short = device_engine(), device_engine(slab=100)
    tokens = tokens_of(engine, rng, 300)
    parts = [engine.session() for _ in range(2)]
    parts[0].feed(tokens)
    for a, b in ((0, 64), (64, 192), (192, 300)):
        parts[1].feed(tokens[a:b])
    states = [s.state.recurrent for s in parts]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    np.testing.assert_allclose(short.logits(tokens), engine.logits(tokens), atol=CLOSE)
    expected = engine.logits(tokens)
    expected = expected - np.logaddexp.reduce(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(short.logprobs(tokens), expected[np.arange(299), tokens[1:]], atol=CLOSE)


@pytest.mark.parametrize("seed", range(4))
def test_states_go_everywhere(seed, tmp_path):
    """Snapshots, bytes, files, the prefix cache: every way back to a state gives the same logits in every bit."""
    rng = np.random.default_rng(seed)
    config = random_config(rng, layer_types=("linear_attention", "full_attention", "sliding_attention"),
                           sliding_window=int(rng.choice([5, 64, 100])))
    engine = device_engine(config, seed, cache_bytes=1 << 30)
    n = int(rng.integers(1, 200))
    session = engine.session()
    session.prefill(tokens_of(engine, rng, n))
    mark, data = session.snapshot(), session.state.to_bytes()
    session.save(tmp_path / "s")
    after = [session.step(t) for t in (1, 2, 3)]

    def same(other):
        for t, logits in zip((1, 2, 3), after, strict=True):
            np.testing.assert_array_equal(other.step(t), logits)

    session.restore(mark)
    same(session)
    other = engine.session()
    other.load(tmp_path / "s")
    same(other)
    other.restore(other.state.loaded(data))
    same(other)
    assert mark.nbytes >= mark.own_nbytes > 0
    # The host's state of the same layout holds the same numbers.
    from hybridlm.engine.state import State

    host = State.from_bytes(data, engine.layout)
    assert host.to_bytes() == data == engine.session().state.loaded(data).to_bytes()
    with pytest.raises(FormatError, match="damaged"):
        session.state.loaded(data[:-40] + bytes(8) + data[-32:])

    prompt = tokens_of(engine, rng, 150)
    first = [p.token for p in engine.generate(prompt, max_tokens=5, temperature=0, ignore_eos=True)]
    again = engine.generate(prompt, max_tokens=5, temperature=0, ignore_eos=True)
    assert [p.token for p in again] == first and again.reused_tokens == 150
    engine.save_cache(tmp_path / "cache")
    count, size = len(engine.cache), engine.cache.nbytes
    engine.cache.clear()
    assert engine.load_cache(tmp_path / "cache") == count and engine.cache.nbytes == size
    again = engine.generate(prompt, max_tokens=5, temperature=0, ignore_eos=True)
    assert [p.token for p in again] == first and again.reused_tokens == 150


def test_kernels_and_states_agree_on_the_page():
    paged_attention = pytest.importorskip("hybridlm.ops.triton.paged_attention")
    assert paged_attention.PAGE.value == PAGE and PAGE % paged_attention.BLOCK.value == 0


def test_clones_share_full_pages_only():
    engine = device_engine()
    session = engine.session()
    session.feed(tokens_of(engine, np.random.default_rng(0), 2 * PAGE + 100))
    mark = session.snapshot()
    mine, theirs = session.state.blocks(), mark.blocks()
    assert len(mine) == 2 and all(a is b for a, b in zip(mine, theirs, strict=True))
    before = mark.to_bytes()
    for t in range(50):
        session.feed([t])
    assert mark.to_bytes() == before
    assert len(session.state.blocks()) == 3


def test_guesses_are_taken_back():
    rng = np.random.default_rng(3)
    engine = device_engine()
    text = tokens_of(engine, rng, 70)
    session, plain = engine.session(), engine.session()
    session.feed(text)
    plain.feed(text)
    rows = engine.step([(session, [1, 2, 3, 4])], every=True, trial=True)
    session.take_back(2)
    np.testing.assert_allclose(rows[0], plain.step(1), atol=CLOSE)
    np.testing.assert_allclose(rows[1], plain.step(2), atol=CLOSE)
    np.testing.assert_allclose(session.step(9), plain.step(9), atol=CLOSE)
    prompt = [5, 6, 7, 8] * 10
    options = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
    guessed = [p.token for p in engine.generate(prompt, speculative=True, **options)]
    assert guessed == [p.token for p in engine.generate(prompt, **options)]


def test_under_the_scheduler():
    """Many outputs at once are those that each has alone."""
    config = small_config()
    rng = np.random.default_rng(4)
    engine = device_engine(config, cache_bytes=1 << 26)
    prompts = [tokens_of(engine, rng, n) for n in (3, 130, 40, 300, 1, 64)]

    def writer(on, prompt):
        return Writer(on, prompt, Sampler(0.0), max_tokens=8)

    expected = []
    for prompt in prompts:
        w = writer(device_engine(config, cache_bytes=1 << 26), prompt)
        session = w.begin()
        while tokens := w.slice():
            session.feed(tokens)
        while (piece := w.write(session.logits())).finish is None:
            session.feed([piece.token])
        expected.append(w.tokens)
    scheduler = Scheduler(engine, running=4)
    try:
        streams = [scheduler.submit(writer(engine, prompt)) for prompt in prompts]
        for stream, want in zip(streams, expected, strict=True):
            list(stream)
            assert stream.writer.tokens == want
    finally:
        scheduler.close()


def test_opens_files(tmp_path):
    """A GGUF file and a folder of safetensors give what the CPU's engine gives."""
    from tests.cli.micro import write_micro

    from hybridlm.formats.convert import convert

    write_micro(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf", "f32")
    tokens = [1, 5, 2, 7, 3] * 20
    with Engine.open(tmp_path / "m.gguf", kv_type="f32", exact=True) as reference:
        expected = reference.logits(tokens)
        text = "".join(p.text for p in reference.generate("the cat", max_tokens=5, temperature=0))
    for path in (tmp_path / "m.gguf", tmp_path / "m"):
        with open_engine(Engine, path, "cpu", exact=True) as engine:
            np.testing.assert_allclose(engine.logits(tokens), expected, atol=CLOSE)
            assert "".join(p.text for p in engine.generate("the cat", max_tokens=5, temperature=0)) == text
            assert engine.model_bytes > 0 and engine.decode_bytes_per_token(10) > 0
    convert(tmp_path / "m", tmp_path / "q.gguf", "q8_0")
    with Engine.open(tmp_path / "q.gguf", kv_type="f32", exact=True) as reference, \
            open_engine(Engine, tmp_path / "q.gguf", "cpu", exact=True) as engine:
        np.testing.assert_allclose(engine.logits(tokens), reference.logits(tokens), atol=CLOSE)


def test_bfloat16_stays_near():
    config = HybridConfig.preset("tiny")
    wide, narrow = (random_engine(Engine, config, device="cpu", exact=exact) for exact in (True, False))
    tokens = tokens_of(wide, np.random.default_rng(5), 100)
    a, b = wide.logits(tokens), narrow.logits(tokens)
    assert narrow.layout.kv_type == "bf16" and wide.layout.kv_type == "f32"
    assert 0 < np.abs(a - b).max() < 0.2 * np.abs(a).max()


def test_what_fast_paths_may_cost():
    """`device_pairs`: bfloat16's own cost is the measure; a path that costs more is found."""
    from hybridlm.evals.agreement import compare
    from hybridlm.evals.paths import BF16, device_pairs

    config = HybridConfig.preset("tiny").with_(vocab_size=300)
    exact = random_engine(Engine, config, device="cpu", exact=True)
    narrow, other = (random_engine(Engine, config, seed, "cpu") for seed in (0, 1))
    tokens = [np.array(tokens_of(exact, np.random.default_rng(8), 90), np.int32)]

    def verdicts(fast):
        results = []
        for reference, path, budget in device_pairs(exact, narrow, fast, narrow, BF16, results):
            results.append(compare(reference, path, tokens, budget() if callable(budget) else budget))
        return [r.passed for r in results]

    assert all(verdicts(narrow))
    assert verdicts(other) == [True, True, *[False] * 5, True, True]


def test_what_cannot_be(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", small_config(), random_tensors(small_config(), np.random.default_rng(0)))
    with pytest.raises(HybridLMError, match="q8_0"):
        open_engine(Engine, path, "cpu", kv_type="q8_0")
    with pytest.raises(HybridLMError, match="bf16"):
        Engine.open(path, kv_type="bf16")
    with pytest.raises(HybridLMError, match='use "cpu" or "cuda"'):
        Engine.open(path, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(HybridLMError, match='device="cpu"'):
            Engine.open(path, device="cuda")
    tensors = random_tensors(small_config(), np.random.default_rng(0))
    broken = write_gguf(tmp_path / "broken.gguf", small_config(), tensors,
                        leave_out="blk.0.attn_q.weight")
    with pytest.raises(FormatError, match="missing"):
        open_engine(Engine, broken, "cpu")


@pytest.mark.gpu
def test_on_a_gpu_recorded_steps_equal_unrecorded_ones():
    config = HybridConfig.preset("tiny")
    usual, plain = (random_engine(Engine, config, ops={"graphs": graphs}) for graphs in (True, False))
    rng = np.random.default_rng(6)
    texts = [tokens_of(usual, rng, int(n)) for n in rng.integers(1, 300, 5)]
    a, b = ([e.session() for _ in texts] for e in (usual, plain))
    usual.feed(list(zip(a, texts, strict=True)))
    plain.feed(list(zip(b, texts, strict=True)))
    for t in range(70):
        x, y = (e.step([(s, [t]) for s in sessions]) for e, sessions in ((usual, a), (plain, b)))
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_on_a_gpu_company_changes_nothing():
    engine = random_engine(Engine, HybridConfig.preset("tiny"), invariant=True)
    rng = np.random.default_rng(7)
    texts = [tokens_of(engine, rng, int(n)) for n in rng.integers(3, 200, 32)]
    alone, sessions = engine.session(), [engine.session() for _ in texts]
    found = [alone.prefill(texts[5]), *(alone.step(t) for t in range(8))]
    among = [engine.step(list(zip(sessions, texts, strict=True)))[5]]
    among += [engine.step([(s, [t]) for s in sessions])[5] for t in range(8)]
    for a, b in zip(found, among, strict=True):
        np.testing.assert_array_equal(a, b)
