"""Encoders and decoders of the block types, against gguf-py and against what rounding can be expected to do."""

import gguf
import numpy as np
import pytest
from tests.native.block_types import QUANTISED, TYPES, block, meaning, random_blocks, row_bytes

from hybridlm import native

EACH_ISA = pytest.mark.parametrize("isa", native.available())


@pytest.fixture(autouse=True)
def _settings():
    isa, threads = native.isa(), native.threads()
    yield
    native.set_isa(isa)
    native.set_threads(threads)


def encode(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    out = np.full((len(x), row_bytes(name, x.shape[1])), 0xAA, np.uint8)
    native.quantize(TYPES[name], x, out, importance)
    return out


def error(name: str, x: np.ndarray, raw: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Root of the squared error over the root of the squares, both weighed by column."""
    y = meaning(name, raw, x.shape[1]).astype(np.float64)
    return float(np.sqrt(((y - x) ** 2 * weights).sum() / (x.astype(np.float64) ** 2 * weights).sum()))


@EACH_ISA
@pytest.mark.parametrize("name", list(TYPES))
def test_decoders_give_what_gguf_gives(isa, name):
    native.set_isa(isa)
    rng = np.random.default_rng(0)
    for rows, cols in ((1, 256), (7, 1024), (70, 2048)):
        raw = random_blocks(name, rows, cols, rng)
        out = np.full((rows, cols), np.nan, np.float32)
        native.dequantize(TYPES[name], raw, out)
        assert np.array_equal(out, meaning(name, raw, cols))


# Relative root mean squared errors on normal weights, with a little room. Each lies below what the plain rule for the
# type (the largest magnitude fills the range) gives: 0.086 for Q4_0, 0.043 for Q5_0.
EXPECTED = {
    "Q8_0": 0.0056, "Q4_0": 0.082, "Q5_0": 0.041, "IQ4_NL": 0.0745, "Q4_K": 0.071, "Q5_K": 0.035, "Q6_K": 0.0178,
    "F32": 0.0, "F16": 3e-4, "BF16": 2e-3,
}


@EACH_ISA
@pytest.mark.parametrize("name", list(TYPES))
def test_round_trip_error(isa, name):
    native.set_isa(isa)
    x = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    assert error(name, x, encode(name, x)) <= EXPECTED[name]


@EACH_ISA
@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0"])
def test_same_bytes_as_gguf(isa, name):
    native.set_isa(isa)
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((50, 512)) * np.exp(rng.normal(0, 6, (50, 1)))).astype(np.float32)
    x[0] = 0
    x[1, :64] = np.round(x[1, :64] * 4) / 4  # ties
    with np.errstate(over="ignore"):
        expected = gguf.quantize(x, gguf.GGMLQuantizationType(TYPES[name])).view(np.uint8).reshape(50, -1)
    assert np.array_equal(encode(name, x), expected)


@EACH_ISA
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_special_floats(isa, name):
    native.set_isa(isa)
    x = np.array([[0.0, -0.0, np.inf, -np.inf, 65504, 65519, 65520, 1e-8, 5.96e-8, 6.1e-5, -6.0e-5, 3e38, 1.0,
                   2.0**-25, 2.98023224e-8, 1 + 2**-11]], np.float32)
    with np.errstate(over="ignore"):
        expected = gguf.quantize(x, gguf.GGMLQuantizationType(TYPES[name])).view(np.uint8).reshape(1, -1)
    assert np.array_equal(encode(name, x), expected)
    nan = encode(name, np.full((1, 4), np.nan, np.float32))
    assert np.isnan(meaning(name, nan, 4)).all()


@EACH_ISA
@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_never_worse_than_gguf(isa, name):
    native.set_isa(isa)
    rng = np.random.default_rng(3)
    for kind in range(4):
        x = [rng.standard_normal((40, 256)), rng.uniform(-1, 1, (40, 256)), rng.standard_t(2, (40, 256)),
             np.exp(rng.standard_normal((40, 256)))][kind].astype(np.float32)
        plain = gguf.quantize(x, gguf.GGMLQuantizationType(TYPES[name])).reshape(40, -1)
        ours = encode(name, x)
        shape = (40, 8, 32)
        by_block = [
            ((meaning(name, raw, 256) - x.astype(np.float64)) ** 2).reshape(shape).sum(-1) for raw in (ours, plain)
        ]
        assert (by_block[0] <= by_block[1] * (1 + 1e-5) + 1e-12).all()
        assert by_block[0].sum() < (0.93 if kind == 0 else 1.0) * by_block[1].sum()


def best_line(x: np.ndarray, most: int) -> float:
    """Least squared error of a block by offset and scale in full precision, by brute force: a floor for Q4_K, Q5_K."""
    best = float((x**2).sum())
    low, high = min(x.min(), 0), max(x.max(), 0)
    for low_at in np.linspace(0, 1.2, 25):
        for high_at in np.linspace(0.6, 1.2, 25):
            a, b = low * low_at, high * high_at
            if b <= a:
                continue
            q = np.clip(np.rint((x - a) / ((b - a) / most)), 0, most)
            design = np.stack([q, np.ones_like(q)], 1)
            fit, *_ = np.linalg.lstsq(design, x, rcond=None)
            if fit[1] <= 0 and fit[0] > 0:
                best = min(best, float(((design @ fit - x) ** 2).sum()))
    return best


@pytest.mark.parametrize(("name", "most"), [("Q4_K", 15), ("Q5_K", 31)])
def test_scales_and_minima_are_near_the_best(name, most):
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((2, 256)) + rng.normal(0, 0.3, (2, 1))).astype(np.float32)
    y = meaning(name, encode(name, x), 256)
    ours = float(((y - x).astype(np.float64) ** 2).sum())
    floor = sum(best_line(part.astype(np.float64), most) for part in x.reshape(-1, 32))
    assert ours <= 1.12 * floor


@EACH_ISA
@pytest.mark.parametrize("name", [n for n in QUANTISED if n != "Q8_0"])
def test_importance_moves_the_error_to_where_it_matters_less(isa, name):
    native.set_isa(isa)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.exp(rng.normal(0, 1.5, 512)).astype(np.float32)
    plain, weighed = encode(name, x), encode(name, x, importance)
    assert error(name, x, weighed, importance) < 0.97 * error(name, x, plain, importance)
    assert error(name, x, weighed) < 1.5 * error(name, x, plain)
    assert np.array_equal(encode(name, x, np.zeros(512, np.float32)), plain)


@EACH_ISA
@pytest.mark.parametrize("name", QUANTISED)
def test_extremes(isa, name):
    native.set_isa(isa)
    cols = 512
    x = np.zeros((8, cols), np.float32)
    x[1] = 3.25
    x[2] = -3.25
    x[3, 100] = 5.0
    x[4] = 1e-7 * np.random.default_rng(6).standard_normal(cols)
    x[5] = 1e-40
    x[6] = np.random.default_rng(6).uniform(0.9, 1.1, cols)
    x[7] = np.repeat(np.array([-1.0, 1.0], np.float32), cols // 2)
    y = meaning(name, encode(name, x), cols)
    assert np.isfinite(y).all()
    assert not y[0].any() and not y[5].any()
    for row in (1, 2, 6, 7):
        assert np.abs(y[row] - x[row]).max() <= 0.1 * np.abs(x[row]).max(), row
    assert abs(y[3, 100] - 5.0) < 0.5 and np.abs(np.delete(y[3], 100)).max() < 0.5
    for bad in (np.nan, np.inf):
        z = np.ones((1, cols), np.float32)
        z[0, 3] = bad
        assert np.isnan(meaning(name, encode(name, z), cols)[0, :32]).all()


def test_rows_and_threads_do_not_matter():
    rng = np.random.default_rng(7)
    x = rng.standard_normal((33, 768)).astype(np.float32)
    for name in TYPES:
        together = encode(name, x)
        native.set_threads(1)
        assert np.array_equal(together, np.concatenate([encode(name, x[i : i + 1]) for i in range(33)]))
        native.set_threads(2)


def test_sizes_that_do_not_fit():
    x = np.zeros((2, 64), np.float32)
    out = np.zeros((2, 36), np.uint8)
    native.quantize(2, x, out)
    native.quantize(2, x[:0], out[:0])
    native.dequantize(2, out, x)
    narrow, short = x[:, :63].copy(), np.zeros((2, 35), np.uint8)
    for kind, a, b in [(2, narrow, out), (2, x, out[:1]), (2, x, short), (12, x, out), (99, x, out)]:
        with pytest.raises(ValueError, match=r"block|must be|type"):
            native.quantize(kind, a, b)
        with pytest.raises(ValueError, match=r"block|must be|type"):
            native.dequantize(kind, b, a)
    for importance in (np.ones(63, np.float32), np.full(64, -1, np.float32), np.full(64, np.nan, np.float32)):
        with pytest.raises(ValueError, match="importance"):
            native.quantize(2, x, out, importance)
    with pytest.raises(TypeError):
        native.quantize(2, x.astype(np.float64), out)


def test_block_sizes():
    for name in QUANTISED:
        weights, size = block(name)
        assert encode(name, np.ones((1, weights), np.float32)).shape == (1, size)
