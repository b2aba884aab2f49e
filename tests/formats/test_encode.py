"""Encoders: every type that can be written comes back within its own error, whoever encodes it."""

import gguf
import numpy as np
import pytest

from hybridlm.errors import FormatError
from hybridlm.formats import encode as encode_module
from hybridlm.formats.blocks import GGMLType, block_size, dequantize, row_bytes
from hybridlm.formats.encode import can_encode, encodable, encode

# Root mean square error over that of the values, of Gaussian weights; 10% above what ggml's encoders reach.
ERRORS = {"F32": 0, "F64": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_1": 0.042, "Q5_0": 0.048,
          "Q5_K": 0.045, "Q4_1": 0.086, "Q4_K": 0.086, "Q4_0": 0.095, "IQ4_NL": 0.09, "IQ4_XS": 0.095}


def gaussian(rows=32, cols=512, seed=3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32) * 0.02


@pytest.mark.parametrize("kind", encodable(), ids=lambda k: k.name)
def test_error_of_each_type(kind):
    x = gaussian()
    raw = encode(kind, x)
    assert raw.dtype == np.uint8 and raw.shape == (32, row_bytes(kind, 512))
    y = dequantize(kind, raw, x.shape)
    assert np.sqrt(((y - x) ** 2).mean() / (x**2).mean()) <= ERRORS.get(kind.name, 0.4)
    assert not dequantize(kind, encode(kind, np.zeros((2, 512), np.float32)), (2, 512)).any()
    if kind not in (GGMLType.F32, GGMLType.F64):
        half = block_size(kind) if block_size(kind) > 1 else 7
        np.testing.assert_array_equal(raw[5:9], encode(kind, x[5:9]))  # rows do not depend on each other
        assert encode(kind, x[:1, :half]).shape == (1, row_bytes(kind, half))


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q5_1, GGMLType.Q5_0, GGMLType.Q4_1, GGMLType.Q4_0],
                         ids=lambda k: k.name)
def test_native_encoders_are_as_good_as_gguf_py(kind, monkeypatch):
    x = gaussian()
    mine = dequantize(kind, encode(kind, x), x.shape)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, gguf.GGMLQuantizationType(int(kind))),
                                    gguf.GGMLQuantizationType(int(kind)))
    assert ((mine - x) ** 2).mean() <= ((theirs - x) ** 2).mean() * 1.001
    monkeypatch.setattr(encode_module, "_native", lambda kind: False)
    np.testing.assert_array_equal(dequantize(kind, encode(kind, x), x.shape), theirs)  # the way without native code


def test_types_without_encoder():
    for kind in (GGMLType.IQ1_S, GGMLType.I8):
        assert not can_encode(kind)
        with pytest.raises(FormatError, match="cannot be written; these can: f32"):
            encode(kind, np.ones((1, 256), np.float32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rounding_is_to_nearest(kind):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((7, 33)) * 10.0 ** rng.integers(-8, 4, (7, 33))).astype(np.float32)
    x[0, :4] = [0.0, -0.0, 3.3e38 if kind == "bf16" else 6.5e4, 1e-45]
    got = encode(GGMLType[kind.upper()], x).view(np.uint16).reshape(x.shape)
    if kind == "f16":
        np.testing.assert_array_equal(got.view(np.float16), x.astype(np.float16))
    else:
        torch = pytest.importorskip("torch")
        want = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(got, want)
