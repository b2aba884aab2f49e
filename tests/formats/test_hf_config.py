"""`config.json`: transformers' own configuration classes are the judge of what a file means."""

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.formats.helpers import configs

from hybridlm.config import FULL, LINEAR, PRESETS, SLIDING, HybridConfig, Rope
from hybridlm.errors import ConfigError
from hybridlm.formats.hf_config import from_hf, read_config, to_hf, write_config

transformers = pytest.importorskip("transformers")
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "initializer_range",
          "bos_token_id", "pad_token_id")
LINEAR_ONLY = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
               "linear_conv_kernel_dim", "linear_allow_neg_eigval", "linear_a_log_min", "linear_a_log_max",
               "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")


def same(ours: HybridConfig, theirs) -> None:
    """Field by field, and rotary frequencies as transformers computes them."""
    hybrid = theirs.model_type == "olmo_hybrid"
    for name in SHARED + (LINEAR_ONLY if hybrid else ("sliding_window",)):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types
    eos = theirs.eos_token_id
    assert ours.eos_token_id == (tuple(eos) if isinstance(eos, list) else eos)
    for kind, rope in ((FULL, ours.rope), (SLIDING, ours.sliding_rope)):
        if kind in ours.layer_types:
            same_rope(rope, ours.head_dim, theirs, None if hybrid else kind)


def same_rope(rope, head_dim, theirs, kind) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    p = theirs.rope_parameters if kind is None else theirs.rope_parameters[kind]
    if rope is None:
        assert p["rope_theta"] is None
        return
    assert p["rope_theta"] == rope.theta and p["rope_type"] == ("yarn" if rope.yarn else "default")
    if rope.yarn:
        frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu", layer_type=kind)
        assert scale == pytest.approx(rope.scale, rel=1e-12)
        assert rope.inv_freq(head_dim) == pytest.approx(frequencies.numpy(), rel=1e-5, abs=1e-12)


def theirs_of(folder):
    return transformers.AutoConfig.from_pretrained(folder)


@FEW
@given(config=configs() | configs(hybrid=False))
def test_transformers_reads_what_we_write_and_so_do_we(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    write_config(config, folder)
    same(config, theirs_of(folder))
    assert read_config(folder) == config
    theirs_of(folder).save_pretrained(folder)  # and what transformers makes of it
    assert read_config(folder) == config


@FEW
@given(data=st.fixed_dictionaries({}, optional={
    "num_hidden_layers": st.integers(2, 9), "num_key_value_heads": st.sampled_from([None, 2]),
    "linear_num_key_heads": st.sampled_from([None, 2]), "linear_key_head_dim": st.sampled_from([None, 8]),
    "eos_token_id": st.sampled_from([None, 7, [7, 8]]), "pad_token_id": st.sampled_from([None, 7]),
    "tie_word_embeddings": st.booleans(), "rope_theta": st.sampled_from([1e6, 20_000]),
    "rope_parameters": st.sampled_from([
        None, {}, {"rope_theta": None}, {"rope_theta": 5e5}, {"rope_type": "default"}, {"type": "default"},
        {"rope_type": "yarn", "factor": 4.0}, {FULL: {"rope_theta": 7e3}}, {FULL: {"rope_type": "yarn", "factor": 2.0},
                                                                           SLIDING: {"rope_theta": 3e4}}]),
    "rope_scaling": st.sampled_from([None, {"rope_type": "yarn", "factor": 8.0,
                                            "original_max_position_embeddings": 1024}]),
}), kind=st.sampled_from(["olmo_hybrid", "olmo3"]))
def test_absent_keys_mean_what_they_mean_to_transformers(data, kind, tmp_path_factory):
    if kind == "olmo_hybrid" and FULL in (data.get("rope_parameters") or {}):
        data["rope_parameters"] = None  # transformers reads nested parameters of this class as none at all
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **data, "num_attention_heads": 4}))
    try:
        theirs = theirs_of(folder)
    except KeyError:  # its olmo3 class cannot read rope_scaling beside rope_parameters
        assume(False)
    same(read_config(folder), theirs)


def test_nope_is_explicit_and_an_absent_key_is_theta_10000():
    assert from_hf({"model_type": "olmo_hybrid"}).rope == Rope(10_000.0)
    assert from_hf({"model_type": "olmo_hybrid", "rope_parameters": {"rope_theta": None}}).rope is None
    assert from_hf({"model_type": "olmo_hybrid", "rope_parameters": {"rope_type": None}}).rope is None
    assert to_hf(PRESETS["7b"])["rope_parameters"]["rope_theta"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_and_twins_round_trip(name, tmp_path):
    for config in (PRESETS[name], PRESETS[name].twin()):
        config = config.with_(extra={"dtype": "bfloat16", "unheard_of": [1, {"a": None}]})
        config.save_pretrained(tmp_path)
        again = HybridConfig.from_pretrained(tmp_path)
        assert again == config and again.extra == config.extra
        same(config, theirs_of(tmp_path))


def test_shapes_beyond_transformers_round_trip(tmp_path):
    for kinds in ((LINEAR,), (LINEAR, SLIDING), (LINEAR, SLIDING, FULL)):
        config = PRESETS["tiny"].with_(layer_types=kinds, sliding_window=8, sliding_rope=Rope(2e4) if SLIDING in kinds
                                       else None, rope=None)
        write_config(config, tmp_path)
        assert read_config(tmp_path) == config


@pytest.mark.parametrize(("field", "data"), [
    ("model_type", {"model_type": "llama"}),
    ("model_type", {"model_type": None}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("attention_bias", {"attention_bias": True}),
    ("head_dim", {"head_dim": 64}),
    ("layer_types", {"layer_types": "linear_attention"}),
    ("layer_types", {"layer_types": ["chunked_attention"] * 32}),
    ("num_hidden_layers", {"layer_types": ["full_attention"]}),
    ("num_hidden_layers", {"num_hidden_layers": 10**9}),
    ("vocab_size", {"vocab_size": -5}),
    ("vocab_size", {"vocab_size": None}),
    ("linear_num_value_heads", {"linear_num_value_heads": 31}),
    ("num_key_value_heads", {"num_key_value_heads": 7}),
    ("rope_parameters", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}),
    ("rope_parameters", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
    ("rope_parameters", {"rope_parameters": [1]}),
    ("rope_parameters", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("rope", {"rope_parameters": {"rope_theta": -1}}),
    ("tie_word_embeddings", {"tie_word_embeddings": "yes"}),
    ("eos_token_id", {"eos_token_id": ["</s>"]}),
    ("rms_norm_eps", {"rms_norm_eps": 0}),
    ("config.json", {"rms_norm_eps": "small"}),
    ("config.json", {"rope_parameters": {"rope_theta": "ten"}}),
])
def test_what_cannot_be_is_refused_with_the_key_named(field, data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmo_hybrid", **data}))
    with pytest.raises(ConfigError, match=rf"^{field}:"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_files(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)
