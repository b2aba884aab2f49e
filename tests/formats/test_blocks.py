"""Block types: sizes and decoded values against gguf-py's."""

import gguf
import numpy as np
import pytest

from hybridlm.errors import FormatError
from hybridlm.formats.blocks import SIZES, GGMLType, block_size, dequantize, nbytes, type_of

QUANTISED = [t for t in GGMLType if SIZES[t][0] > 1]


@pytest.mark.parametrize("kind", GGMLType, ids=lambda k: k.name)
def test_sizes_are_ggmls(kind):
    assert SIZES[kind] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert gguf.GGMLQuantizationType[kind.name] == kind
    assert nbytes(kind, 3 * block_size(kind)) == 3 * SIZES[kind][1]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_random_blocks_decode_as_gguf_decodes_them(kind):
    rng = np.random.default_rng(int(kind))
    block, size = SIZES[kind]
    raw = rng.integers(0, 256, (5 * 3, size), dtype=np.uint8)
    theirs = gguf.GGMLQuantizationType(int(kind))
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, theirs).reshape(5, 3 * block)
        got = dequantize(kind, raw.reshape(-1), (5, 3 * block))
    assert got.dtype == np.float32 and np.isfinite(want).mean() > 0.5
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-30)


def test_plain_types():
    x = np.array([[1.5, -2.0, 3.0e4], [0.0, 1e-3, -1.0]], np.float32)
    for kind, code in ((GGMLType.F32, "<f4"), (GGMLType.F16, "<f2"), (GGMLType.F64, "<f8")):
        np.testing.assert_array_equal(dequantize(kind, np.frombuffer(x.astype(code).tobytes(), np.uint8), x.shape),
                                      x.astype(code).astype(np.float32))
    assert dequantize(GGMLType.I8, np.array([255, 1], np.uint8), (2,)).tolist() == [-1, 1]
    assert dequantize(GGMLType.BF16, np.array([0x80, 0x3F], np.uint8), (1,)).tolist() == [1.0]


def test_names():
    assert type_of("q4_0") == type_of("Q4_0") == type_of(2) == GGMLType.Q4_0
    for bad in ("q4", "", 4, 999):
        with pytest.raises(FormatError, match="unknown"):
            type_of(bad)


def test_wrong_sizes_are_refused():
    with pytest.raises(FormatError, match="whole blocks"):
        nbytes(GGMLType.Q4_0, 33)
    with pytest.raises(FormatError, match="not a"):
        dequantize(GGMLType.Q8_0, np.zeros(33, np.uint8), (32,))
