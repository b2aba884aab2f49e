"""The CPU engine on real files: against float64, against the PyTorch model, and what it says about broken files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tests.engine.helpers import finish_gguf, random_config, random_tensors, reference_engine, small_config, write_gguf
from tests.text.helpers import byte_level

from hybridlm import native
from hybridlm.config import FULL, LINEAR, SLIDING, HybridConfig, Rope, Yarn
from hybridlm.engine import Engine, Sampler
from hybridlm.engine.passes import SLAB
from hybridlm.errors import FormatError, HybridLMError
from hybridlm.formats.blocks import GGMLType, dequantize
from hybridlm.formats.encode import encode
from hybridlm.formats.policy import tensor_type

ISAS = native.available()


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def pair(tmp_path, config, seed=0, kv_type="f32", **options):
    """The same random model in a file on the CPU, and in float64."""
    tensors = random_tensors(config, np.random.default_rng(seed))
    path = write_gguf(tmp_path / "model.gguf", config, tensors)
    return Engine.open(path, kv_type=kv_type, **options), reference_engine(config, tensors=tensors)


def error(got, want):
    return np.abs(got - want).max() / max(1, np.abs(want).max())


@pytest.mark.parametrize("seed", range(10))
def test_equals_float64_on_random_models(tmp_path, seed, isa):
    check_against_float64(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 400))
def test_equals_float64_on_many_random_models(tmp_path, seed):
    native.set_isa(ISAS[seed % len(ISAS)])
    try:
        check_against_float64(tmp_path, seed)
    finally:
        native.set_isa(ISAS[-1])


def check_against_float64(tmp_path, seed):
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    engine, truth = pair(tmp_path, config, seed)
    with engine:
        tokens = rng.integers(0, config.vocab_size, int(rng.choice([1, 2, 15, 64, 100, 150]))).tolist()
        want = truth.logits(tokens)
        assert error(engine.logits(tokens), want) < 1e-4
        session, at = engine.session(), 0
        while at < len(tokens):  # in parts, single tokens among them
            n = int(rng.choice([1, 1, 3, 20, 65]))
            assert error(session.prefill(tokens[at:at + n]), want[min(at + n, len(tokens)) - 1]) < 1e-4
            at += n


def test_slabs_and_side_by_side(tmp_path):
    rng = np.random.default_rng(0)
    config = small_config(layer_types=(LINEAR, SLIDING, FULL), sliding_window=100, sliding_rope=Rope(1e4, Yarn(4, 64)))
    engine, truth = pair(tmp_path, config)
    with engine:
        texts = [rng.integers(0, 96, n).tolist() for n in (2 * SLAB + 40, 3, 50, 2, 1, 130)]
        whole = [truth.logits(t) for t in texts]
        assert error(engine.logits(texts[0]), whole[0]) < 2e-5
        for got, want in zip(engine.score(texts), truth.score(texts), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        sessions = [engine.session() for _ in texts]
        engine.feed([(s, t[:-1]) for s, t in zip(sessions, texts, strict=True) if len(t) > 1])
        got = engine.step([(s, t[-1:]) for s, t in zip(sessions, texts, strict=True)])
        assert error(got, np.stack([w[-1] for w in whole])) < 2e-5


@pytest.mark.parametrize("kv_type, bound", [("f16", 2e-3), ("q8_0", 2e-2)])
def test_smaller_keys_and_values_lose_little(tmp_path, kv_type, bound):
    rng = np.random.default_rng(1)
    config = small_config(hidden_size=64, num_attention_heads=2)
    engine, truth = pair(tmp_path, config, kv_type=kv_type)
    tokens = rng.integers(0, 96, 200).tolist()
    want = truth.logits(tokens)
    found = error(engine.logits(tokens), want)
    assert 1e-6 < found < bound


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q5_0", "q4_K", "q6_K"])
def test_quantised_weights_are_the_numbers_they_stand_for(tmp_path, kind):
    """Against float64 with the weights as the blocks decode; what is left then is the 8 bits of the activations."""
    from gguf import GGMLQuantizationType, GGUFWriter

    rng = np.random.default_rng(2)
    config = small_config(hidden_size=256, intermediate_size=512, num_attention_heads=4, linear_key_head_dim=48,
                          linear_value_head_dim=96, layer_types=(LINEAR, FULL))
    tensors, decoded = random_tensors(config, rng), {}
    writer = GGUFWriter(str(tmp_path / "model.gguf"), "olmo-hybrid")
    writer.add_string("hybridlm.config", json.dumps(config.to_dict()))
    for name, value in tensors.items():
        chosen = tensor_type(name, value.shape, GGMLType[kind.upper()], tied=False)
        if chosen == GGMLType.F32:
            writer.add_tensor(name, value)
            decoded[name] = value
        else:
            data = np.asarray(encode(chosen, value)).reshape(len(value), -1)
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType(int(chosen)))
            decoded[name] = dequantize(chosen, data, value.shape)
    finish_gguf(writer)
    truth = reference_engine(config, tensors=decoded)
    tokens = rng.integers(0, 96, 70).tolist()
    want = truth.logits(tokens)
    for exact in (True, False):
        with Engine.open(tmp_path / "model.gguf", kv_type="f32", exact=exact) as engine:
            session = engine.session()
            for got in (engine.logits(tokens), np.stack([session.step(t) for t in tokens])):
                if exact or kind in ("f16", "bf16"):
                    assert error(got, want) < 2e-5
                else:
                    # 0.5% a matmul, through the dozen that follow one another here.
                    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.06


def test_tokens_taken_back_leave_the_same_state(tmp_path):
    rng = np.random.default_rng(3)
    engine, truth = pair(tmp_path, small_config(linear_num_value_heads=4))
    tokens, guesses = rng.integers(0, 96, 90).tolist(), rng.integers(0, 96, 8).tolist()
    for kept in range(9):
        session = engine.session()
        session.prefill(tokens[:60])
        rows = engine.step([(session, guesses)], every=True, trial=True)
        assert error(rows, truth.logits(tokens[:60] + guesses)[60:]) < 2e-5
        session.take_back(8 - kept)
        want = truth.logits(tokens[:60] + guesses[:kept] + tokens[60:])
        assert error(session.prefill(tokens[60:]), want[-1]) < 2e-5
        plain = engine.session()
        plain.prefill(tokens[:60])
        for token in guesses[:kept]:
            plain.step(token)
        again = engine.session()
        again.prefill(tokens[:60])
        engine.step([(again, guesses)], trial=True)
        again.take_back(8 - kept)
        np.testing.assert_allclose(again.state.recurrent, plain.state.recurrent, atol=1e-5)


def test_generation_end_to_end_with_and_without_guesses(tmp_path):
    tokenizer = byte_level()
    config = small_config(vocab_size=tokenizer.vocab_size)
    tensors = random_tensors(config, np.random.default_rng(0))
    path = write_gguf(tmp_path / "m.gguf", config, tensors, tokenizer_json=tokenizer.to_json(), chat_template="{{ 1 }}")
    engine = Engine.open(path)
    assert engine.chat_template.render([]) == "1" and engine.tokenizer.fingerprint == tokenizer.fingerprint
    assert engine.name == "m" and engine.model_bytes == path.stat().st_size
    for options in ({"temperature": 0}, {"seed": 3}):
        texts = [engine.generate("the cat sat", max_tokens=60, speculative=s, **options) for s in (False, True)]
        for t in texts:
            assert "".join(p.text for p in t) == t.text
        assert texts[0].tokens == texts[1].tokens and texts[0].text == tokenizer.decode(texts[0].tokens)
    session, sampler, tokens = engine.session(), Sampler(0), engine.encode("the cat sat")
    logits = session.prefill(tokens)
    for token in engine.generate("the cat sat", max_tokens=20, temperature=0, ignore_eos=True):
        assert token.token == sampler.sample(logits)
        logits = session.step(token.token)


def test_a_chat_is_the_same_with_and_without_the_cache(tmp_path):
    rng = np.random.default_rng(4)
    config = small_config()
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng))
    warm, cold = Engine.open(path, checkpoint_every=50), Engine.open(path, cache_bytes=0)
    history: list[int] = []
    for turn in range(6):
        history += rng.integers(0, 96, 70).tolist()
        outputs = []
        for engine in (warm, cold):
            generation = engine.generate(history, max_tokens=30, temperature=0, ignore_eos=True)
            list(generation)
            outputs.append(generation.tokens)
        assert outputs[0] == outputs[1]
        assert warm.cache.stats.hits == turn
        history += outputs[0]
    assert cold.cache.stats.hits == 0 and warm.cache.stats.reused_tokens == 5 * 99 + 100 * (1 + 2 + 3 + 4)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0", "q4_K"])
def test_random_weights(kind):
    config = HybridConfig.preset("tiny").with_(hidden_size=256, intermediate_size=512)
    engine = Engine.random(config, kind, seed=1)
    logits = engine.logits(list(range(50)))
    assert np.isfinite(logits).all() and 0.2 < logits.std() < 5
    assert np.array_equal(Engine.random(config, kind, seed=1).logits(list(range(50))), logits)
    assert not np.array_equal(Engine.random(config, kind, seed=2).logits(list(range(50))), logits)
    if kind == "f32":
        assert engine.model_bytes == 4 * config.num_parameters()
        kv = engine.layout.kv_bytes_read(0)
        fixed = 4 * (config.conv_channels * 3 + config.value_heads * config.key_dim * config.value_dim)
        assert engine.decode_bytes_per_token() == engine.model_bytes + 2 * 3 * fixed + kv
    with pytest.raises(HybridLMError, match="type"):
        Engine.random(config, "q9_9")


def test_broken_files_are_named(tmp_path):
    config = small_config()
    tensors = random_tensors(config, np.random.default_rng(0))
    path = write_gguf(tmp_path / "missing.gguf", config, tensors, leave_out="blk.1.attn_k.weight")
    with pytest.raises(FormatError, match=r"missing\.gguf: .*blk\.1\.attn_k\.weight"):
        Engine.open(path)
    wrong = {**tensors, "blk.0.attn_v.weight": tensors["blk.0.attn_v.weight"][:-1]}
    with pytest.raises(FormatError, match=r"blk\.0\.attn_v\.weight"):
        Engine.open(write_gguf(tmp_path / "shape.gguf", config, wrong))
    with pytest.raises(FormatError, match="is a folder"):
        Engine.open(tmp_path)
    with pytest.raises(FormatError, match=r"none\.gguf"):
        Engine.open(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello, this is not a model at all")
    with pytest.raises(FormatError, match="not a GGUF"):
        Engine.open(tmp_path / "text.gguf")
    good = write_gguf(tmp_path / "good.gguf", config, tensors)
    for options, words in (({"device": "cuda"}, "CUDA"), ({"device": "tpu"}, "tpu"), ({"threads": 0}, "threads"),
                           ({"kv_type": "q8_0"}, "kv_type"), ({"context": -1}, "context")):
        with pytest.raises(HybridLMError, match=words):
            Engine.open(good, **options)


def test_odd_configurations_in_a_file(tmp_path):
    wide = small_config(layer_types=(SLIDING, LINEAR), sliding_window=1 << 60)
    engine, _ = pair(tmp_path, wide)
    tensors = random_tensors(wide, np.random.default_rng(0))
    truth = reference_engine(wide.with_(layer_types=(FULL, LINEAR), rope=None), tensors=tensors)
    tokens = list(range(90))
    assert error(engine.logits(tokens), truth.logits(tokens)) < 2e-5
    session = engine.session()
    session.prefill(tokens)
    session.save(tmp_path / "state")
    session.load(tmp_path / "state")
    for rope in (Rope(1e4, Yarn(4, 0)), Rope(1e4, Yarn(4, 64, beta_fast=0))):
        with pytest.raises(HybridLMError, match="rope"):
            pair(tmp_path, small_config(rope=rope))


def test_missing_kernels_are_one_sentence():
    code = """
import sys
sys.modules["hybridlm.native._native"] = None
import hybridlm
try:
    hybridlm.Engine.random(hybridlm.HybridConfig.preset("tiny"))
except hybridlm.errors.HybridLMError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("the compiled kernels are missing"), run.stderr


def test_runs_with_torch_absent(tmp_path):
    tokenizer = byte_level()
    config = small_config(vocab_size=tokenizer.vocab_size)
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, np.random.default_rng(0)),
                      tokenizer_json=tokenizer.to_json())
    code = """
import sys
sys.modules["torch"] = None  # importing it now fails
import hybridlm, hybridlm.engine
engine = hybridlm.Engine.open(sys.argv[1])
generation = engine.generate("the cat", max_tokens=5, temperature=0, ignore_eos=True)
assert len(list(generation)) == 5
heavy = ("torch", "transformers", "scipy", "pandas", "gguf", "huggingface_hub", "typer", "rich")
loaded = [name for name, module in sys.modules.items() if module is not None and name.split(".")[0] in heavy]
assert not loaded, loaded
print("fine")
"""
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "fine", run.stderr
