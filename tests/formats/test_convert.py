"""Conversion: names, shapes, types and values of the GGUF file, opened by gguf-py and by our own reader."""

import json

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.formats.helpers import configs, generations, weights, write_folder

from hybridlm.config import PRESETS, HybridConfig, Rope, Yarn
from hybridlm.errors import ConfigError, FormatError
from hybridlm.formats import convert as convert_module
from hybridlm.formats.blocks import SIZES, GGMLType, block_size
from hybridlm.formats.convert import convert
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.hf_config import write_config
from hybridlm.formats.names import specs
from hybridlm.formats.policy import tensor_type

TINY = PRESETS["tiny"].with_(vocab_size=300, hidden_size=64, intermediate_size=96)
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]


def model(folder, config=TINY, seed=0, generation="released", dtype="F32", **options):
    """A folder with random weights; returns them."""
    tensors = weights(config, seed)
    write_config(config, folder)
    write_folder(folder, generations(tensors)[generation], dtype, **options)
    return tensors


def expected(tensors, spec):
    value = tensors[spec.name]
    if spec.gguf.endswith(".ssm_a"):
        value = -np.exp(value.astype(np.float64)).astype(np.float32)
    return value.reshape(spec.shape)


@settings(max_examples=12, deadline=None)
@given(config=configs() | configs(hybrid=False), generation=st.sampled_from(["released", "fused", "former"]),
       kind=st.sampled_from(TYPES), seed=st.integers(0, 99))
def test_round_trip(config, generation, kind, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tensors = model(folder, config, seed, generation, max_shard_bytes=50_000)
    summary = convert(folder, folder / "out.gguf", kind)
    theirs = {t.name: t for t in gguf.GGUFReader(folder / "out.gguf").tensors}
    with GGUFFile.open(folder / "out.gguf") as file:
        file.check()
        assert file.config == config and theirs.keys() == file.tensors.keys() == {s.gguf for s in specs(config)}
        for spec in specs(config):
            t, other = file.tensors[spec.gguf], theirs[spec.gguf]
            want = expected(tensors, spec)
            assert t.shape == spec.shape == tuple(int(n) for n in other.shape[::-1])
            assert t.type == other.tensor_type and t.nbytes == other.n_bytes
            np.testing.assert_array_equal(file.data(spec.gguf), other.data.reshape(-1).view(np.uint8))
            got = file.array(spec.gguf)
            np.testing.assert_array_equal(
                got, gguf.quants.dequantize(other.data, other.tensor_type).reshape(spec.shape))
            if t.type == GGMLType.F32:
                np.testing.assert_array_equal(got, want)
            else:  # within one step of the block's grid
                assert np.abs(got - want).max() <= {"f16": 2e-3, "bf16": 2e-2, "q8_0": 0.025}.get(kind, 0.5)
    assert summary.tensors == len(theirs) and summary.nbytes == (folder / "out.gguf").stat().st_size
    assert sum(summary.types.values()) == summary.tensors and not summary.has_tokenizer


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_source_types(dtype, tmp_path):
    model(tmp_path, dtype=dtype)
    convert(tmp_path, tmp_path / "out.gguf", "f32")
    from hybridlm.formats.checkpoint import Checkpoint

    source = Checkpoint.open(tmp_path)
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        for spec in specs(TINY):
            want = source.array(spec.name)
            if not spec.gguf.endswith(".ssm_a"):
                np.testing.assert_array_equal(file.array(spec.gguf), want.reshape(spec.shape))


def test_rows_in_blocks_equal_rows_at_once(tmp_path, monkeypatch):
    model(tmp_path)
    convert(tmp_path, tmp_path / "a.gguf", "q8_0")
    monkeypatch.setattr(convert_module, "BLOCK_BYTES", 1000)
    seen = []
    convert(tmp_path, tmp_path / "b.gguf", "q8_0", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert len(seen) > 300 and seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_the_recurrence_stays_in_float32():
    for name, config in PRESETS.items():
        for spec in specs(config):
            kind = tensor_type(spec.gguf, spec.shape, GGMLType.Q4_0, tied=config.tie_word_embeddings)
            small = any(x in spec.gguf for x in ("norm", "conv1d", "ssm_a", "ssm_dt", "ssm_beta"))
            head = spec.gguf == "output.weight" or (name == "tiny" and spec.gguf == "token_embd.weight")
            assert kind == (GGMLType.F32 if small else GGMLType.Q8_0 if head else GGMLType.Q4_0), spec.gguf


def test_rows_that_are_no_whole_blocks_fall_back():
    def kind(cols, wanted):
        return tensor_type("blk.0.ssm_out.weight", (8, cols), wanted, tied=False)

    assert kind(5760, GGMLType.Q4_K) == GGMLType.Q5_0 and kind(5760, GGMLType.Q6_K) == GGMLType.Q8_0
    assert kind(3840, GGMLType.Q4_K) == GGMLType.Q4_K
    for wanted in GGMLType:
        for cols in (33, 32, 288, 512):
            got = kind(cols, wanted)
            assert cols % block_size(got) == 0
            assert SIZES[got][1] / SIZES[got][0] >= SIZES[wanted][1] / SIZES[wanted][0] or wanted in (
                GGMLType.Q8_0, GGMLType.F32, GGMLType.F64, GGMLType.I64, GGMLType.I32)


def test_metadata_in_llama_cpps_words(tmp_path):
    config = PRESETS["7b"]
    from hybridlm.formats.metadata import model_entries

    entries = {k: e.value for k, e in model_entries(config, "x").items()}
    p = "olmo-hybrid"
    assert entries[f"{p}.ssm.state_size"] == 96 and entries[f"{p}.ssm.inner_size"] == 5760
    assert entries[f"{p}.ssm.group_count"] == entries[f"{p}.ssm.time_step_rank"] == 30
    assert entries[f"{p}.attention.head_count_kv"] == [0, 0, 0, 30] * 8
    assert entries[f"{p}.full_attention_interval"] == 4
    assert entries[f"{p}.rope.dimension_count"] == 0 and entries[f"{p}.rope.freq_base"] == 0.0  # NoPE, said aloud
    rope = model_entries(config.with_(rope=Rope(5e5, Yarn(8.0, 8192))), "x")
    assert rope[f"{p}.rope.scaling.type"].value == "yarn" and rope[f"{p}.rope.dimension_count"].value == 128
    olmo3 = model_entries(PRESETS["olmo3-7b"], "x")
    assert olmo3[f"{p}.attention.sliding_window"].value == 4096 and f"{p}.ssm.state_size" not in olmo3
    assert HybridConfig.from_dict(json.loads(entries["hybridlm.config"])) == config


def test_generation_config_names_more_ends(tmp_path):
    model(tmp_path, TINY.with_(eos_token_id=3))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    convert(tmp_path, tmp_path / "out.gguf", "f32")
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        assert file.config.eos_token_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match="eos_token_id"):
        convert(tmp_path, tmp_path / "out.gguf", "f32")


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path):
    tensors = model(tmp_path)
    for kind in ("q1_0", "iq1_s", "i8"):
        with pytest.raises(FormatError, match="type"):
            convert(tmp_path, tmp_path / "out.gguf", kind)
    name = "model.layers.0.mlp.up_proj.weight"
    for value, kind, match in ((np.nan, "f32", "not finite"), (np.inf, "q8_0", "not finite"), (1e9, "f16", "bf16")):
        broken = dict(tensors)
        broken[name] = tensors[name].copy()
        broken[name][5, 7] = value
        write_folder(tmp_path, broken)
        with pytest.raises(FormatError, match=rf"{name}.*{match}"):
            convert(tmp_path, tmp_path / "out.gguf", kind)
    with pytest.raises(ConfigError):
        convert(tmp_path / "nowhere", tmp_path / "out.gguf", "f32")
    assert not [p for p in tmp_path.iterdir() if "gguf" in p.name]


def test_types_that_can_be_written():
    names = convert_module.TYPES
    assert set(TYPES) <= set(names) and "f64" not in names and "i8" not in names
