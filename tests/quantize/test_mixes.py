"""The mixes: as many bits as documented, float32 where the recurrence needs it, and nothing that cannot be run."""

import math

import numpy as np
import pytest

from hybridlm import native
from hybridlm.config import PRESETS
from hybridlm.errors import FormatError
from hybridlm.formats.blocks import GGMLType, nbytes, row_bytes
from hybridlm.formats.names import specs
from hybridlm.formats.policy import MIXES, base_type, recipe, tensor_type

BITS = {"q4_s": 4.70, "q4_m": 4.88, "q5_m": 5.63, "q6_m": 6.72}  # docs/quantisation.md


@pytest.mark.parametrize("name", list(MIXES))
def test_bits_of_the_7b(name):
    config = PRESETS["7b"]
    types = {s.gguf: tensor_type(s.gguf, s.shape, recipe(name), tied=False) for s in specs(config)}
    bits = 8 * sum(nbytes(types[s.gguf], math.prod(s.shape)) for s in specs(config)) / config.num_parameters()
    assert bits == pytest.approx(BITS[name], abs=0.006)
    for s in specs(config):
        small = any(part in s.gguf for part in ("norm", "conv1d", "ssm_a", "ssm_dt", "ssm_beta"))
        assert (types[s.gguf] == GGMLType.F32) == small, s.gguf


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", [*MIXES, "q4_0", "iq4_nl", "q4_k", "q5_k", "q6_k"])
def test_the_runtime_multiplies_by_every_type(name, preset):
    config = PRESETS[preset]
    for cols, kind in {(s.shape[1], tensor_type(s.gguf, s.shape, recipe(name), tied=config.tie_word_embeddings))
                       for s in specs(config) if s.matrix}:
        native.Matrix(np.zeros((4, row_bytes(kind, cols)), np.uint8), int(kind), 4, cols)


def test_a_tied_table_is_a_head():
    for mix in MIXES.values():
        kind = tensor_type("token_embd.weight", (512, 256), mix, tied=True)
        assert kind == mix.roles.get("head", mix.base) == tensor_type("output.weight", (512, 256), mix, tied=False)


def test_names():
    assert recipe("Q4_M") is MIXES["q4_m"] and base_type(recipe("q4_m")) == GGMLType.Q4_K
    assert recipe("q4_0") == base_type(recipe("q4_0")) == GGMLType.Q4_0
    with pytest.raises(FormatError, match=r"'q4_x' is unknown.*mixes q4_s"):
        recipe("q4_x")
