"""The architecture as data: counts, ratios, the matched twin, and refusals that name the field."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.config import FULL, LINEAR, PRESETS, SLIDING, HybridConfig, Rope, Yarn
from hybridlm.errors import ConfigError

LADDER = ["60m", "100m", "190m", "370m", "760m", "1b"]


def small(**changes):
    base = dict(vocab_size=97, hidden_size=48, intermediate_size=80, layer_types=(LINEAR, FULL), num_attention_heads=3)
    return HybridConfig(**{**base, **changes})


def test_released_models_have_the_published_parameter_counts():
    assert HybridConfig.preset("7b").num_parameters() == 7_430_870_688
    assert HybridConfig.preset("7b").num_parameters(embedding=False) == 6_660_167_328
    assert HybridConfig.preset("olmo3-7b").num_parameters() == 7_298_617_344


def test_7b_geometry():
    c = HybridConfig.preset("7b")
    assert (c.head_dim, c.key_dim, c.value_dim, c.key_heads, c.value_heads) == (128, 96, 192, 30, 30)
    assert [i for i, kind in enumerate(c.layer_types) if kind == FULL] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert c.rope is None and c.conv_channels == 11_520


@pytest.mark.parametrize("name", [*LADDER, "7b", "tiny"])
def test_twin_is_matched_within_one_percent(name):
    hybrid = HybridConfig.preset(name)
    twin = HybridConfig.preset(f"{name}-twin")
    assert set(twin.layer_types) == {FULL} and twin.rope is not None
    for same in ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(twin, same) == getattr(hybrid, same)
    ratio = twin.num_parameters(embedding=False) / hybrid.num_parameters(embedding=False)
    assert abs(ratio - 1) < 0.01


@pytest.mark.parametrize("name", LADDER)
def test_ladder_keeps_the_7b_ratios(name):
    c, big = HybridConfig.preset(name), HybridConfig.preset("7b")
    assert (c.head_dim, c.key_dim, c.value_dim) in {(64, 48, 96), (128, 96, 192)}
    assert c.key_heads * c.key_dim / c.hidden_size == big.key_heads * big.key_dim / big.hidden_size == 0.75
    assert c.value_heads * c.value_dim / c.hidden_size == 1.5
    assert abs(c.intermediate_size / c.hidden_size / (big.intermediate_size / big.hidden_size) - 1) < 0.08
    assert c.layer_types == big.layer_types[: c.num_hidden_layers]


def test_head_counts_of_the_ladder():
    assert HybridConfig.preset("60m").num_attention_heads == 6
    assert HybridConfig.preset("760m").num_attention_heads == 12


@given(
    hidden=st.sampled_from([64, 96, 128, 320]), layers=st.integers(4, 12), heads=st.sampled_from([2, 4]),
    ff=st.integers(64, 700), tied=st.booleans(),
)
def test_any_hybrid_has_a_matched_twin(hidden, layers, heads, ff, tied):
    c = small(hidden_size=hidden, intermediate_size=ff, num_attention_heads=heads, tie_word_embeddings=tied,
              layer_types=tuple(FULL if i % 4 == 3 else LINEAR for i in range(layers)))
    ratio = c.twin().num_parameters(embedding=False) / c.num_parameters(embedding=False)
    assert abs(ratio - 1) < 0.01


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("vocab_size", {"vocab_size": 0}),
        ("hidden_size", {"hidden_size": -3}),
        ("intermediate_size", {"intermediate_size": True}),
        ("num_attention_heads", {"num_attention_heads": 5}),
        ("num_key_value_heads", {"num_key_value_heads": 2}),
        ("linear_num_value_heads", {"linear_num_value_heads": 4}),
        ("linear_key_head_dim", {"linear_key_head_dim": 0}),
        ("layer_types", {"layer_types": ()}),
        ("layer_types", {"layer_types": ("mamba",)}),
        ("sliding_window", {"layer_types": (SLIDING,)}),
        ("sliding_window", {"layer_types": (SLIDING,), "sliding_window": 0}),
        ("rope", {"rope": Rope(float("nan"))}),
        ("rope", {"rope": Rope(1e4, Yarn(0.5, 4096))}),
        ("rms_norm_eps", {"rms_norm_eps": 0.0}),
        ("linear_a_log_max", {"linear_a_log_max": 0.0}),
        ("linear_dt_max", {"linear_dt_max": 1e-5}),
        ("num_attention_heads", {"hidden_size": 45, "rope": Rope()}),
        ("linear_conv_kernel_dim", {"linear_conv_kernel_dim": 2.5}),
    ],
)
def test_impossible_shapes_are_refused_with_the_field_named(field, changes):
    with pytest.raises(ConfigError, match=rf"^{field}:"):
        small(**changes)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="preset"):
        HybridConfig.preset("8b")
    with pytest.raises(ConfigError, match="n_layer"):
        small().with_(n_layer=3)


@pytest.mark.parametrize("config", [*PRESETS.values(), small(eos_token_id=[1, 2], extra={"x": 1})])
def test_round_trip_through_json(config):
    again = HybridConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and dict(again.extra) == dict(config.extra)


@pytest.mark.parametrize("data", [{}, {"vocab_size": 3}, {**small().to_dict(), "surprise": 1},
                                  {**small().to_dict(), "rope": {"thetta": 1}}])
def test_from_dict_refuses_what_it_does_not_know(data):
    with pytest.raises(ConfigError):
        HybridConfig.from_dict(data)


def test_rope_frequencies():
    plain = Rope(10_000.0).inv_freq(8)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    # YaRN leaves fast dimensions alone and slows the slowest by its factor.
    yarn = Rope(500_000.0, Yarn(8.0, 8192)).inv_freq(128)
    base = Rope(500_000.0).inv_freq(128)
    assert yarn[0] == base[0]
    np.testing.assert_allclose(yarn[-1], base[-1] / 8, rtol=1e-6)
    assert Rope(yarn=Yarn(8.0, 8192)).scale == pytest.approx(1.2079441541679836)


def test_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().vocab_size = 4
