"""Matrix products of every type on every instruction set, against float64 on gguf-py's reading of the same blocks."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.native.block_types import QUANTISED, TYPES, block, meaning, random_blocks, row_bytes

from hybridlm import native

BOTH = pytest.mark.parametrize("name", list(TYPES))
EACH_ISA = pytest.mark.parametrize("isa", native.available())


@pytest.fixture(autouse=True)
def _settings():
    isa, threads = native.isa(), native.threads()
    yield
    native.set_isa(isa)
    native.set_threads(threads)


def product(matrix: native.Matrix, x: np.ndarray, exact: bool = False) -> np.ndarray:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    native.linear(x, [matrix], [out], exact)
    return out


def blockwise(x: np.ndarray) -> np.ndarray:
    """x as the fast path sees it: 8 bits, a scale for each 32 columns. float64."""
    t, cols = x.shape
    parts = x.reshape(t, cols // 32, 32).astype(np.float32)
    largest = np.abs(parts).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 1e-30)
    scale = np.where(largest > 1e-30, largest / np.float32(127), 0).astype(np.float64)
    return (np.rint(parts * inverse) * scale).reshape(t, cols)


def check(name: str, rows: int, cols: int, t: int, rng: np.random.Generator) -> None:
    raw = random_blocks(name, rows, cols, rng)
    w = meaning(name, raw, cols).astype(np.float64)
    x = (rng.standard_normal((t, cols)) * np.exp(rng.normal(0, 2, (t, 1)))).astype(np.float32)
    matrix = native.Matrix(raw, TYPES[name], rows, cols)
    assert (matrix.rows, matrix.cols, matrix.type, matrix.nbytes) == (rows, cols, TYPES[name], raw.nbytes)

    # Sums of float32: an error of a few units in the last place of the magnitudes that are added.
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).T
    bound = 2e-7 * np.sqrt(cols) * magnitude + 1e-30
    assert (np.abs(product(matrix, x, exact=True) - x.astype(np.float64) @ w.T) <= bound).all()
    fast = product(matrix, x)
    if name in QUANTISED:
        # Q4_K and Q5_K subtract a minimum from a scale times up to 31: the parts are larger than what is left of them.
        seen = blockwise(x)
        room = 8 if name in ("Q4_K", "Q5_K") else 1
        size = room * (np.abs(seen) @ np.abs(w).T) + np.abs(seen).sum(-1, keepdims=True) * np.abs(w).max()
        assert (np.abs(fast - seen @ w.T) <= 3e-7 * np.sqrt(cols / 32) * size + 1e-30).all()
    else:
        assert (np.abs(fast - x.astype(np.float64) @ w.T) <= bound).all()


@EACH_ISA
@BOTH
@pytest.mark.parametrize("t", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64])
def test_rows_of_x(isa, name, t):
    native.set_isa(isa)
    check(name, 37, 512, t, np.random.default_rng(t))


@EACH_ISA
@BOTH
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (16, 256), (15, 768), (33, 1280), (5, 11008), (100, 256)])
def test_shapes(isa, name, rows, cols):
    native.set_isa(isa)
    rng = np.random.default_rng(rows * cols)
    for t in (1, 4, 20):
        check(name, rows, cols, t, rng)


@EACH_ISA
@pytest.mark.parametrize("name", [n for n in TYPES if block(n)[0] <= 32])
@pytest.mark.parametrize("cols", [32, 64, 96, 288, 480, 5760])
def test_columns_that_end_inside_a_unit(isa, name, cols):
    native.set_isa(isa)
    rng = np.random.default_rng(cols)
    for t in (1, 3, 18):
        check(name, 19, cols, t, rng)


@EACH_ISA
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("cols", [1, 2, 7, 17, 63, 1001])
def test_float_rows_of_any_width(isa, name, cols):
    native.set_isa(isa)
    rng = np.random.default_rng(cols)
    for t in (1, 5, 11):
        check(name, 7, cols, t, rng)


@EACH_ISA
@BOTH
def test_long_prompt(isa, name):
    native.set_isa(isa)
    check(name, 48, 256, 300, np.random.default_rng(5))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(TYPES)), st.sampled_from(native.available()), st.integers(1, 70), st.integers(1, 9),
       st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_random_shapes(name, isa, rows, blocks, t, seed):
    native.set_isa(isa)
    check(name, rows, blocks * max(block(name)[0], 32), t, np.random.default_rng(seed))


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(list(TYPES)), st.sampled_from(native.available()), st.integers(1, 300), st.integers(1, 40),
       st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_random_shapes_many(name, isa, rows, blocks, t, seed):
    native.set_isa(isa)
    check(name, rows, blocks * max(block(name)[0], 32), t, np.random.default_rng(seed))


@EACH_ISA
@BOTH
@pytest.mark.parametrize("exact", [False, True])
def test_alone_or_together_is_bitwise_the_same(isa, name, exact):
    """A row of x gives the same numbers whatever rows come with it and however many threads there are."""
    native.set_isa(isa)
    rng = np.random.default_rng(3)
    cols, rows = 1280, 83
    matrix = native.Matrix(random_blocks(name, rows, cols, rng), TYPES[name], rows, cols)
    x = rng.standard_normal((41, cols)).astype(np.float32)
    native.set_threads(1)
    alone = np.concatenate([product(matrix, x[i : i + 1], exact) for i in range(len(x))])
    for threads in (1, 2, 5):
        native.set_threads(threads)
        for t in (2, 3, 4, 5, 7, 8, 9, 16, 17, 40, 41):
            assert np.array_equal(product(matrix, x[:t], exact), alone[:t]), (threads, t)


def test_matrices_of_many_types_in_one_call():
    rng = np.random.default_rng(4)
    cols = 512
    weights = {name: random_blocks(name, 10 + 7 * i, cols, rng) for i, name in enumerate(TYPES)}
    matrices = [native.Matrix(raw, TYPES[name], len(raw), cols) for name, raw in weights.items()]
    for t in (1, 6, 30):
        x = rng.standard_normal((t, cols)).astype(np.float32)
        outs = [np.full((t, m.rows), np.nan, np.float32) for m in matrices]
        native.linear(x, matrices, outs)
        for matrix, out in zip(matrices, outs, strict=True):
            assert np.array_equal(out, product(matrix, x))


@EACH_ISA
def test_extremes_of_x(isa):
    native.set_isa(isa)
    rng = np.random.default_rng(6)
    raw = random_blocks("Q8_0", 20, 64, rng)
    matrix = native.Matrix(raw, TYPES["Q8_0"], 20, 64)
    zero = np.zeros((2, 64), np.float32)
    assert np.array_equal(product(matrix, zero), np.zeros((2, 20), np.float32))
    for tiny in (1e-38, 1e-41):
        assert np.isfinite(product(matrix, np.full((1, 64), tiny, np.float32))).all()
    large = np.full((1, 64), 1e30, np.float32)
    w = meaning("Q8_0", raw, 64).astype(np.float64)
    assert np.allclose(product(matrix, large), 1e30 * w.sum(-1), rtol=1e-4, atol=1e25)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((3, 64), np.float32)
        x[1, 5] = bad
        out = product(matrix, x)
        assert not np.isfinite(out[1]).any() and np.isfinite(out[[0, 2]]).all()


@EACH_ISA
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ4_NL", "Q5_0", "Q4_K", "Q5_K", "Q4_0"])
def test_largest_products_do_not_overflow(isa, name):
    """Every code at an end of its range, every activation at 127 or -127: sums of 16 bits have no room for these."""
    native.set_isa(isa)
    cols = 256
    weights, size = block(name)
    for code in (0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0):
        raw = np.full((17, cols // weights, size), code, np.uint8)
        for place in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
            raw[:, :, place : place + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        raw = raw.reshape(17, -1)
        w = meaning(name, raw, cols).astype(np.float64)
        matrix = native.Matrix(raw, TYPES[name], 17, cols)
        for sign in (1, -1):
            x = np.full((3, cols), 127.0 * sign, np.float32)
            x[1, ::2] *= -1
            x[2] = 127.0 * np.sign(w[0]) * sign + (w[0] == 0)
            exact = x.astype(np.float64) @ w.T
            size_of = np.abs(x).astype(np.float64) @ (np.abs(w).T + np.abs(w).max())
            assert (np.abs(product(matrix, x) - exact) <= 1e-5 * size_of).all(), (code, sign)


@BOTH
def test_read_only_memory_at_any_address(name):
    """Quantised blocks may start at any byte, as tensors of a mapped file do; float data must lie at its own size."""
    rng = np.random.default_rng(8)
    cols, rows = 256, 21
    raw = random_blocks(name, rows, cols, rng)
    shift = 1 if name in QUANTISED else 4
    memory = b"\0" * shift + raw.tobytes()
    view = memoryview(memory)[shift:]
    x = rng.standard_normal((2, cols)).astype(np.float32)
    matrix = native.Matrix(view, TYPES[name], rows, cols)
    del view, memory
    assert np.array_equal(product(matrix, x), product(native.Matrix(raw, TYPES[name], rows, cols), x))
    if name not in QUANTISED:
        with pytest.raises(ValueError, match="multiple"):
            native.Matrix(memoryview(b"\0" + raw.tobytes())[1:], TYPES[name], rows, cols)


def test_matrix_keeps_its_memory():
    raw = random_blocks("Q4_0", 64, 512, np.random.default_rng(9))
    x = np.ones((1, 512), np.float32)
    matrix = native.Matrix(raw.copy(), 2, 64, 512)
    expected = product(native.Matrix(raw, 2, 64, 512), x)
    junk = [np.full(raw.nbytes, i, np.uint8) for i in range(20)]
    assert np.array_equal(product(matrix, x), expected) and len(junk) == 20


@pytest.mark.parametrize(("rows", "cols", "size", "kind"), [
    (0, 32, 0, 2), (-1, 32, 18, 2), (1, 0, 18, 2), (1, -32, 18, 2), (1, 33, 36, 2), (2, 32, 35, 2), (1, 128, 144, 12),
    (1, 32, 64, 3), (1, 32, 64, 999), (1 << 40, 32, 18, 2), (1, 1 << 40, 18, 2),
])
def test_impossible_matrices(rows, cols, size, kind):
    with pytest.raises((ValueError, OverflowError)):
        native.Matrix(np.zeros(size, np.uint8), kind, rows, cols)


def test_matrix_needs_contiguous_memory():
    with pytest.raises(ValueError, match="contiguous"):
        native.Matrix(np.zeros((4, 36), np.uint8)[:, ::2], 2, 4, 32)
    with pytest.raises(ValueError, match="contiguous"):
        native.Matrix("text", 2, 1, 32)


def test_shapes_that_do_not_fit():
    matrix = native.Matrix(np.zeros((4, 18), np.uint8), 2, 4, 32)
    x, out = np.zeros((3, 32), np.float32), np.zeros((3, 4), np.float32)
    native.linear(x, [matrix], [out])
    native.linear(x[:0], [matrix], [out[:0]])
    native.linear(x, [], [])
    for bad_x, weights, outs in [
        (x[:, :31].copy(), [matrix], [out]), (x, [matrix], [out[:2]]), (x, [matrix], [np.zeros((3, 5), np.float32)]),
        (x, [matrix, matrix], [out]), (x, [], [out]),
    ]:
        with pytest.raises(ValueError, match=r"columns|must be|outs"):
            native.linear(bad_x, weights, outs)
    strided = np.zeros((3, 8), np.float32)[:, ::2]
    for wrong, to in [(x.astype(np.float64), out), (x, out.astype(np.float64)), (x, strided), (x[0], out)]:
        with pytest.raises((TypeError, ValueError)):
            native.linear(wrong, [matrix], [to])


@EACH_ISA
@BOTH
def test_embed(isa, name):
    native.set_isa(isa)
    rng = np.random.default_rng(10)
    raw = random_blocks(name, 40, 512, rng)
    table = native.Matrix(raw, TYPES[name], 40, 512)
    ids = rng.integers(0, 40, 13).astype(np.int32)
    out = np.full((13, 512), np.nan, np.float32)
    native.embed(table, ids, out)
    assert np.array_equal(out, meaning(name, raw, 512)[ids])
    for bad in (-1, 40, 2**31 - 1):
        with pytest.raises(IndexError, match=str(bad)):
            native.embed(table, np.array([0, bad], np.int32), out[:2])
    with pytest.raises(ValueError, match="out"):
        native.embed(table, ids, out[:2])


def test_calls_from_many_threads():
    rng = np.random.default_rng(11)
    raw = random_blocks("Q4_K", 200, 512, rng)
    matrix = native.Matrix(raw, TYPES["Q4_K"], 200, 512)
    xs = [rng.standard_normal((t, 512)).astype(np.float32) for t in (1, 2, 5, 20)]
    expected = [product(matrix, x) for x in xs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(30):
            if not np.array_equal(product(matrix, xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_row_bytes_agree_with_gguf():
    for name in TYPES:
        size = 3 * row_bytes(name, 256)
        assert native.Matrix(np.zeros(size, np.uint8), TYPES[name], 3, 256).nbytes == size


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


needs_tiles = pytest.mark.skipif("amx" not in native.available(), reason="this processor has no matrix tiles (AMX)")


def prompt_product(matrix: native.Matrix, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    native.linear(x, [matrix], [out], False, True)
    return out


def check_tiles(name: str, rows: int, cols: int, t: int, rng: np.random.Generator) -> None:
    native.set_isa("amx")
    raw = random_blocks(name, rows, cols, rng)
    w = meaning(name, raw, cols)
    x = (rng.standard_normal((t, cols)) * np.exp(rng.normal(0, 2, (t, 1)))).astype(np.float32)
    got = prompt_product(native.Matrix(raw, TYPES[name], rows, cols), x)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64)
    # Against the rounded numbers: what is left is float32 sums, and weights that lie between two bfloat16 numbers up to
    # a unit of float32, which may round to either (one in 2^8 of the magnitude at worst, of few weights).
    assert (np.abs(got - as_bfloat16(x) @ as_bfloat16(w).T) <= 2.0**-8 * magnitude + 1e-30).all()
    error = got - x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.sqrt((error**2).sum()) <= 2.0**-9 * np.sqrt((magnitude**2).sum())
    assert (np.abs(error) <= 2.02 * 2.0**-9 * magnitude + 1e-30).all()


@needs_tiles
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("rows", "cols", "t"), [(1, 256, 17), (37, 512, 33), (33, 1280, 48), (530, 768, 31),
                                                 (16, 2816, 130), (100, 256, 1), (20, 512, 530)])
def test_tiles(name, rows, cols, t):
    check_tiles(name, rows, cols, t, np.random.default_rng(rows + cols + t))


@needs_tiles
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(QUANTISED), st.integers(1, 200), st.integers(1, 20), st.integers(1, 140),
       st.integers(0, 2**32 - 1))
def test_tiles_of_random_shapes(name, rows, blocks, t, seed):
    check_tiles(name, rows, blocks * block(name)[0], t, np.random.default_rng(seed))


@needs_tiles
@pytest.mark.parametrize("name", QUANTISED)
def test_tiles_give_a_row_the_same_numbers_in_any_company(name):
    native.set_isa("amx")
    rng = np.random.default_rng(3)
    cols, rows = 1280, 83
    matrix = native.Matrix(random_blocks(name, rows, cols, rng), TYPES[name], rows, cols)
    x = rng.standard_normal((600, cols)).astype(np.float32)
    native.set_threads(1)
    whole = prompt_product(matrix, x)
    for threads in (1, 2, 5):
        native.set_threads(threads)
        for first, last in ((0, 1), (0, 17), (5, 40), (500, 600), (590, 600)):
            assert np.array_equal(prompt_product(matrix, x[first:last]), whole[first:last])


@needs_tiles
def test_tiles_show_what_is_not_finite():
    native.set_isa("amx")
    rng = np.random.default_rng(6)
    matrix = native.Matrix(random_blocks("Q4_K", 20, 512, rng), TYPES["Q4_K"], 20, 512)
    x = rng.standard_normal((40, 512)).astype(np.float32)
    x[3, 7], x[30, 500] = np.nan, np.inf
    got = prompt_product(matrix, x)
    assert np.isnan(got[3]).all() and not np.isfinite(got[30]).any()
    assert np.isfinite(np.delete(got, (3, 30), axis=0)).all()


@pytest.mark.parametrize("isa", [name for name in native.available() if name != "amx"])
def test_prompts_without_tiles_take_the_common_way(isa):
    native.set_isa(isa)
    rng = np.random.default_rng(7)
    matrix = native.Matrix(random_blocks("Q4_0", 40, 256, rng), TYPES["Q4_0"], 40, 256)
    x = rng.standard_normal((30, 256)).astype(np.float32)
    assert np.array_equal(prompt_product(matrix, x), product(matrix, x))
