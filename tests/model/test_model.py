"""The model against itself: caches, packed documents, precisions, compilation, files, initial weights."""

import json
import math

import pytest
import torch
from tests.model.configs import float64, hybrid_config, olmo3_config, random_model

from hybridlm import HybridConfig
from hybridlm.config import FULL, LINEAR, SLIDING, Rope, Yarn
from hybridlm.errors import FormatError
from hybridlm.formats.checkpoint import Checkpoint
from hybridlm.formats.names import specs
from hybridlm.model import HybridLM
from hybridlm.ops import documents_of

torch.set_num_threads(1)

MIXED = HybridConfig(vocab_size=61, hidden_size=24, intermediate_size=40, num_attention_heads=2,
                     layer_types=(LINEAR, SLIDING, LINEAR, FULL), sliding_window=5, rope=Rope(10_000.0, Yarn(4.0, 64)),
                     sliding_rope=Rope(10_000.0), num_key_value_heads=1, linear_num_key_heads=2,
                     linear_num_value_heads=4, linear_key_head_dim=7, linear_value_head_dim=9)


def tokens(config, seed, *shape):
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# -- shape -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [MIXED, *(hybrid_config(s) for s in range(5)), olmo3_config(0)])
def test_tensors_are_exactly_the_released_ones(config):
    model = HybridLM(config)
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert found == {s.name: s.hf_shape for s in specs(config)}
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize(("preset", "count"), [("7b", 7_430_870_688), ("olmo3-7b", 7_298_617_344)])
def test_released_models_can_be_laid_out(preset, count):
    with torch.device("meta"):
        model = HybridLM(HybridConfig.preset(preset))
    assert sum(p.numel() for p in model.parameters()) == count


def test_logits_are_hidden_times_head():
    for config in (MIXED, MIXED.with_(tie_word_embeddings=True)):
        model, ids = HybridLM(config), tokens(config, 0, 2, 9)
        assert torch.equal(model(ids), model.hidden(ids) @ model.head_weight.T)
    assert model.head_weight is model.model.embed_tokens.weight


# -- decoding --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_cache_continues_the_sequence():
    model, ids = random_model(MIXED, 0), tokens(MIXED, 0, 3, 90)
    want = float64(model)(ids)
    cache, parts = model.new_cache(), []
    for part in ids.split([3, 1, 1, 66, 1, 18], 1):
        parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1).double(), want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert cache.position == 90


@torch.no_grad()
def test_snapshot_is_independent():
    model, ids = random_model(MIXED, 1), tokens(MIXED, 1, 1, 40)
    cache = model.new_cache()
    model(ids[:, :30], cache=cache)
    snapshot = cache.copy()
    first = model(ids[:, 30:], cache=cache)
    model(tokens(MIXED, 2, 1, 7), cache=cache)
    assert snapshot.position == 30 and 0 < snapshot.nbytes < cache.nbytes
    assert torch.equal(model(ids[:, 30:], cache=snapshot.copy()), first)
    assert torch.equal(model(ids[:, 30:], cache=snapshot), first)


@torch.no_grad()
def test_cache_grows_past_its_first_capacity_and_window_does_not_grow():
    model, cache = random_model(MIXED, 1), HybridLM(MIXED).new_cache()
    model(tokens(MIXED, 0, 1, 255), cache=cache)
    for _ in range(3):
        model(tokens(MIXED, 0, 1, 1), cache=cache)
    assert [layer.length for layer in cache.layers if hasattr(layer, "length")] == [4, 258]
    assert all(layer.state.dtype == torch.float32 for layer in cache.layers if hasattr(layer, "state"))


# -- packed documents ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_packed_documents_are_alone(seed):
    """Logits, and the gradient of every weight and of every token's embedding."""
    config = (MIXED, hybrid_config(1), hybrid_config(2), olmo3_config(0))[seed]
    lengths = [[1, 70, 3, 64, 50], [5, 1, 1, 90], [2, 130], [40, 7, 1, 60]][seed]
    model, ids = random_model(config, seed), tokens(config, seed, 1, sum(lengths))
    weight = torch.randn(sum(lengths), config.vocab_size, generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])

    def gradients(loss):
        return dict(zip((n for n, _ in model.named_parameters()), torch.autograd.grad(loss, model.parameters()),
                        strict=True))

    alone = torch.cat([model(part) for part in ids.split(lengths, 1)], 1)
    want = gradients((alone[0] * weight).sum())
    alone = alone.detach()
    for packing in ({"cu_seqlens": bounds}, {"documents": documents_of(bounds, sum(lengths))}):
        logits = model(ids, **packing)
        assert float((logits.detach() - alone).abs().max()) < 1e-5 * max(1.0, float(alone.abs().max()))
        for name, grad in gradients((logits[0] * weight).sum()).items():
            assert float((grad - want[name]).abs().max()) < 1e-5 * max(1.0, float(want[name].abs().max())), name


@torch.no_grad()
def test_packed_documents_with_initial_weights():
    model, ids = HybridLM(MIXED), tokens(MIXED, 9, 1, 200)
    alone = torch.cat([model(part) for part in ids.split([77, 123], 1)], 1)
    assert float((model(ids, cu_seqlens=torch.tensor([0, 77, 200])) - alone).abs().max()) < 1e-5


@torch.no_grad()
def test_rows_of_a_batch_may_be_divided_differently():
    model, ids = random_model(MIXED, 3), tokens(MIXED, 3, 2, 80)
    documents = torch.tensor([[0] * 30 + [1] * 50, [7] * 79 + [3]])
    logits = model(ids, documents=documents)
    for row, start, stop in ((0, 0, 30), (0, 30, 80), (1, 0, 79), (1, 79, 80)):
        alone = model(ids[row:row + 1, start:stop])[0]
        torch.testing.assert_close(logits[row, start:stop], alone, rtol=0, atol=1e-5)


def test_packing_needs_one_row_and_no_cache():
    model, ids = HybridLM(MIXED), tokens(MIXED, 0, 2, 8)
    with pytest.raises(ValueError, match="one row"):
        model(ids, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="cache"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 8]), cache=model.new_cache())


# -- precision and compilation ---------------------------------------------------------------------------------------

def test_casting_keeps_rope_frequencies():
    a, b = HybridLM(MIXED), HybridLM(MIXED).bfloat16().float()
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True)) and list(a.buffers())


def test_float32_weights_with_bfloat16_activations():
    model, ids = random_model(MIXED, 4), tokens(MIXED, 4, 2, 70)
    want = model(ids).detach()
    model.compute_dtype = torch.bfloat16
    logits = model(ids)
    assert logits.dtype == torch.bfloat16
    assert float((logits.detach() - want).norm() / want.norm()) < 0.05
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("dtype", "packed"), [
    (None, True), *(pytest.param(d, p, marks=pytest.mark.slow) for d, p in ((None, False), (torch.bfloat16, True)))])
def test_compiles_without_graph_breaks(dtype, packed):
    """Forward and backward as one graph each; aot_eager runs the graphs as they are."""
    config = MIXED.with_(layer_types=(LINEAR, FULL), sliding_window=None, sliding_rope=None)
    model, ids = random_model(config, 5), tokens(config, 5, 2, 20)
    model.compute_dtype = dtype
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 19 + [1]]) if packed else None
    results = []
    for forward in (model, compiled):
        logits = forward(ids, documents=documents)
        grads = torch.autograd.grad(logits.float().logsumexp(-1).sum(), model.parameters())
        results.append((logits.detach(), *grads))
    for want, got in zip(*results, strict=True):
        assert float((got - want).norm() / want.norm()) < (1e-5 if dtype is None else 0.02)


def test_blocks_compile_once_per_kind():
    config = MIXED.with_(layer_types=(LINEAR, LINEAR, FULL, LINEAR, FULL), sliding_window=None, sliding_rope=None)
    model, ids = random_model(config, 6), tokens(config, 6, 2, 20)
    want = model(ids).detach()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model.compile_blocks(backend=counter)
    torch.testing.assert_close(model(ids).detach(), want, rtol=0, atol=1e-5)
    assert counter.frame_count == 2
    with torch.no_grad():  # decoding has a new length at every call and stays out of it
        cache = model.new_cache()
        parts = [model(part, cache=cache) for part in ids.split([9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=2e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor():
    config = MIXED.with_(layer_types=(LINEAR, FULL), sliding_window=None, sliding_rope=None)
    model, ids = random_model(config, 5), tokens(config, 5, 2, 70)
    logits = model(ids)
    want = torch.autograd.grad(logits.logsumexp(-1).sum(), model.parameters())
    model.compile_blocks()
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-5)
    for got, grad in zip(torch.autograd.grad(model(ids).logsumexp(-1).sum(), model.parameters()), want, strict=True):
        assert float((got - grad).norm() / grad.norm()) < 1e-5


# -- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shard", [5 << 30, 4000])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded(tmp_path, shard, dtype):
    model = random_model(MIXED, 7)
    model.save_pretrained(tmp_path, dtype, max_shard_bytes=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard > 4000)
    loaded = HybridLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        kept = dtype is None or name.endswith(("A_log", "dt_bias"))
        got = loaded.state_dict()[name]
        assert got.dtype == (torch.float32 if kept else dtype) and torch.equal(got, tensor.to(got.dtype)), name
    ids = tokens(MIXED, 7, 1, 30)
    assert loaded(ids).dtype == (dtype or torch.float32)
    assert HybridLM.from_pretrained(tmp_path, dtype=torch.float64)(ids).dtype == torch.float64
    if dtype is None:
        assert torch.equal(loaded(ids), model(ids))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == ("bfloat16" if dtype else "float32")


def test_names_on_disk_are_the_released_ones(tmp_path):
    HybridLM(MIXED).save_pretrained(tmp_path)
    assert list(Checkpoint.open(tmp_path).tensors) == [s.name for s in specs(MIXED)]


def test_weights_of_another_shape_are_refused(tmp_path):
    HybridLM(MIXED).save_pretrained(tmp_path)
    MIXED.with_(intermediate_size=41).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="mlp"):
        HybridLM.from_pretrained(tmp_path)


# -- initial weights -------------------------------------------------------------------------------------------------

def test_initial_weights():
    config = HybridConfig.preset("tiny").with_(linear_num_key_heads=64, linear_num_value_heads=64)
    model = HybridLM(config)
    again, other = HybridLM(config), HybridLM(config)
    other.init_weights(1)
    a, b, c = (m.state_dict() for m in (model, again, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a if not n.endswith("norm.weight"))
    matrix = a["model.layers.0.mlp.up_proj.weight"]
    assert float(matrix.abs().max()) <= 0.06 and abs(float(matrix.std()) / 0.0197 - 1) < 0.03
    decay = a["model.layers.0.linear_attn.A_log"].exp()
    assert 0 < float(decay.min()) < 2 < 14 < float(decay.max()) <= 16
    dt = torch.nn.functional.softplus(a["model.layers.0.linear_attn.dt_bias"])
    assert 1e-3 * 0.999 <= float(dt.min()) < 2e-3 and 0.05 < float(dt.max()) <= 0.1 * 1.001
    assert abs(float(dt.log().mean()) - math.log(1e-2)) < 0.5
    assert all(bool((a[n] == 1).all()) for n in a if n.endswith("norm.weight"))


def test_weights_made_on_no_device_first():
    with torch.device("meta"):
        model = HybridLM(MIXED)
    model.to_empty(device="cpu").init_weights(0)
    ids = tokens(MIXED, 0, 1, 12)
    assert torch.equal(model(ids), HybridLM(MIXED)(ids))
