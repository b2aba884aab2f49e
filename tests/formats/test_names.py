"""The map of names: the engine's list, the 7B's counts, and every way a file may cut its convolutions."""

import numpy as np
import pytest
from hypothesis import given, settings
from tests.formats.helpers import configs, generations, weights

from hybridlm.config import PRESETS
from hybridlm.engine.weights import expected_tensors
from hybridlm.errors import FormatError
from hybridlm.formats.names import canonical, check, conv_parts, specs


@settings(max_examples=30, deadline=None)
@given(config=configs() | configs(hybrid=False))
def test_gguf_side_is_the_engines_list(config):
    ours = {s.gguf: s.shape for s in specs(config)}
    assert list(ours.items()) == list(expected_tensors(config).items())
    assert sum(int(np.prod(s.hf_shape)) for s in specs(config)) == config.num_parameters()


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    assert {s.gguf: s.shape for s in specs(PRESETS[name])} == expected_tensors(PRESETS[name])


def test_the_7b_has_523_tensors():
    assert len({s.name for s in specs(PRESETS["7b"])}) == len({s.gguf for s in specs(PRESETS["7b"])}) == 523


@settings(max_examples=20, deadline=None)
@given(config=configs())
def test_every_generation_maps_back(config):
    tensors = weights(config)
    for generation in generations(tensors).values():
        named = {canonical(n): t for n, t in generation.items()}
        parts = conv_parts({n: t.shape for n, t in named.items()})
        for name, pieces in parts.items():
            joined = np.concatenate([named[source][first:last] for source, first, last in pieces])
            np.testing.assert_array_equal(joined, tensors[name])
        plain = {n: t for n, t in named.items() if n in tensors and n not in parts}
        assert plain.keys() | parts.keys() == tensors.keys()
        for name, t in plain.items():
            np.testing.assert_array_equal(t, tensors[name])


def test_inconsistent_convolutions_are_refused():
    layer = "model.layers.0.linear_attn"
    good = {f"{layer}.{x}_proj.weight": (4, 8) for x in "qkv"}
    good |= {f"{layer}.{x}_conv1d.weight": (4, 1, 4) for x in "qkv"}
    assert conv_parts(good) == {}
    for bad in (
        {n: s for n, s in good.items() if "k_conv" not in n},
        {n: s for n, s in good.items() if "v_proj" not in n},
        good | {f"{layer}.conv1d.weight": (12, 1, 4)},
        good | {f"{layer}.q_conv1d.weight": (5, 1, 4)},
        good | {f"{layer}.q_conv1d.weight": ()},
    ):
        with pytest.raises(FormatError, match="linear_attn"):
            conv_parts(bad)


def test_check_names_the_first_difference():
    check({"a": (2,)}, {"a": (2,)}, "file")
    for found in ({}, {"a": (3,)}, {"a": (2,), "b": (1,)}):
        with pytest.raises(FormatError, match=r"file: tensor [ab] "):
            check(found, {"a": (2,)}, "file")
