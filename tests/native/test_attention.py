"""Attention over stored keys and values against float64: types, blocks, windows, groups, long contexts, extremes."""

from __future__ import annotations

import numpy as np
import pytest
from tests.native.mixer_reference import F16, F32, Q8_0, Store, attention, error, every_isa, pieces, using

from hybridlm import native

ISAS = pytest.mark.parametrize("isa", every_isa())
TYPES = pytest.mark.parametrize("kv_type", [F32, F16, Q8_0])


def filled(rng: np.random.Generator, tokens: int, block: int, kv_type: int, heads: int, d: int,
           scale: float = 1.0) -> tuple[Store, np.ndarray, np.ndarray]:
    """A store, and the keys and values that it really holds."""
    store = Store(tokens, block, kv_type, heads, d)
    for which in (0, 1):
        store.write((scale * rng.standard_normal((tokens, heads * d))).astype(np.float32), which, 0)
    return store, store.read(0, tokens), store.read(1, tokens)


@ISAS
@TYPES
@pytest.mark.parametrize("d", [8, 20, 32, 48, 128, 37])
def test_store(isa: str, kv_type: int, d: int, rng: np.random.Generator) -> None:
    """What is stored is x to the precision of the type, wherever calls cut it, and nothing else is touched."""
    tokens, heads, block = 45, 3, 16
    x = (rng.standard_normal((tokens, heads * d)) * np.exp(rng.normal(0, 2, (tokens, 1)))).astype(np.float32)
    with using(isa):
        store = Store(tokens + 3, block, kv_type, heads, d)
        for first, last in pieces(rng, tokens):
            store.write(np.ascontiguousarray(x[first:last]), 1, first)
    got, want = store.read(1, tokens), x.reshape(tokens, heads, d).astype(np.float64)
    if kv_type == F32:
        assert np.array_equal(got, want)
    elif kv_type == F16:
        assert np.array_equal(got, x.reshape(tokens, heads, d).astype(np.float16).astype(np.float64))
    else:
        for i in range(0, d, 32):  # half a step, and 127 times what the scale loses in half precision
            wide = np.abs(want[..., i:i + 32]).max(-1, keepdims=True)
            assert (np.abs(got - want)[..., i:i + 32] <= wide * (0.5 / 127 + 2.0**-10) + 127 * 2.0**-25).all()
    assert all((m == 0xFF).all() for m in store.memory[0::2])
    raw = np.concatenate([m.reshape(heads, block, -1) for m in store.memory[1::2]], axis=1)
    assert (raw[:, tokens:] == 0xFF).all()


@ISAS
def test_store_of_extremes(isa: str) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = 1e6, -1e6, 65504, 65520, 1e-8, 6e-8
    with using(isa):
        half, eight = Store(1, 4, F16, 1, 32), Store(1, 4, Q8_0, 1, 32)
        half.write(x, 0, 0)
        eight.write(x, 0, 0)
        zeros = Store(1, 4, Q8_0, 1, 32)
        zeros.write(np.zeros((1, 32), np.float32), 0, 0)
    want = np.float32([65504, -65504, 65504, 65504, 0, 2.0**-24])
    assert np.array_equal(half.read(0, 1)[0, 0, :6].astype(np.float32), want)
    assert error(eight.read(0, 1)[0, 0], x[0].astype(np.float64)) < 0.006
    assert (zeros.read(0, 1) == 0).all()


@ISAS
@TYPES
@pytest.mark.parametrize(
    ("T", "start", "block", "Hkv", "group", "d", "window"),
    [(1, 0, 4, 1, 1, 8, 0), (1, 300, 64, 3, 1, 128, 0), (1, 77, 16, 2, 4, 64, 0), (2, 99, 32, 2, 1, 96, 0),
     (3, 50, 10, 1, 1, 40, 7), (4, 130, 64, 2, 1, 128, 0), (9, 0, 5, 2, 3, 24, 0), (70, 0, 64, 1, 1, 128, 0),
     (130, 33, 48, 2, 2, 32, 0), (65, 100, 64, 1, 1, 256, 0), (100, 20, 16, 2, 1, 16, 30), (1, 500, 64, 1, 2, 64, 100),
     (20, 900, 256, 1, 1, 72, 1), (5, 64, 64, 1, 7, 48, 64), (12, 3, 7, 2, 1, 37, 0)],
)
def test_equals_softmax(isa: str, kv_type: int, T: int, start: int, block: int, Hkv: int, group: int, d: int,
                        window: int, rng: np.random.Generator) -> None:
    q = (2 * rng.standard_normal((T, Hkv * group * d))).astype(np.float32)
    with using(isa):
        store, k, v = filled(rng, start + T, block, kv_type, Hkv, d)
        got = store.attend(q, start, window)
    assert error(got, attention(q, k, v, start, window)) < 5e-6


@ISAS
@TYPES
@pytest.mark.parametrize(("T", "heads", "group"), [(1, 2, 1), (1, 1, 8), (6, 1, 1), (40, 1, 1)])
def test_long_context_is_cut_into_spans(isa: str, kv_type: int, T: int, heads: int, group: int,
                                        rng: np.random.Generator) -> None:
    start = 2900
    q = (2 * rng.standard_normal((T, heads * group * 32))).astype(np.float32)
    with using(isa):
        store, k, v = filled(rng, start + T, 128, kv_type, heads, 32)
        for window in (0, 1500):
            got = store.attend(q, start, window)
            assert error(got, attention(q, k, v, start, window)) < 5e-6


@ISAS
@pytest.mark.parametrize("T", [1, 3, 30])
def test_sharp_and_growing_scores(isa: str, T: int, rng: np.random.Generator) -> None:
    """Scores of hundreds, the largest last: weights underflow, and the running maximum moves all the time."""
    start, d = 200, 64
    store = Store(start + T, 32, F32, 1, d)
    k = np.sort(20 * np.abs(rng.standard_normal((start + T, 1))), axis=0) * np.ones((1, d))
    v = rng.standard_normal((start + T, d))
    q = np.abs(rng.standard_normal((T, d))).astype(np.float32)
    with using(isa):
        store.write(k.astype(np.float32), 0, 0)
        store.write(v.astype(np.float32), 1, 0)
        for sign in (1, -1):
            got = store.attend(sign * q, start)
            want = attention(sign * q, store.read(0, start + T), store.read(1, start + T), start)
            assert error(got, want) < 1e-4  # float32 scores of several hundred are known to 3e-5


@ISAS
def test_prefill_in_pieces_equals_the_whole(isa: str, rng: np.random.Generator) -> None:
    T, heads, d = 150, 2, 48
    q, k, v = rng.standard_normal((3, T, heads * d)).astype(np.float32)
    store = Store(T, 32, F16, heads, d)
    parts = []
    with using(isa):
        for first, last in pieces(rng, T):
            store.write(np.ascontiguousarray(k[first:last]), 0, first)
            store.write(np.ascontiguousarray(v[first:last]), 1, first)
            parts.append(store.attend(np.ascontiguousarray(q[first:last]), first))
        whole = store.attend(q, 0)
    assert error(np.concatenate(parts), whole.astype(np.float64)) < 5e-6


@ISAS
@pytest.mark.parametrize(("T", "start"), [(1, 3000), (4, 1000), (100, 40)])
def test_results_do_not_depend_on_threads(isa: str, T: int, start: int, rng: np.random.Generator) -> None:
    q = rng.standard_normal((T, 6 * 32)).astype(np.float32)
    with using(isa):
        store, _, _ = filled(rng, start + T, 64, Q8_0, 3, 32)
    results = []
    for threads in (1, 2, 5):
        with using(isa, threads):
            results.append(store.attend(q, start))
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_random_shapes(rng: np.random.Generator) -> None:
    for _ in range(40):
        T, start, block = int(rng.integers(1, 90)), int(rng.integers(0, 400)), int(rng.integers(1, 90))
        heads, group, d = int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(1, 150))
        window, kv_type = int(rng.choice([0, 0, 1, 5, 100, 1000])), int(rng.choice([F32, F16, Q8_0]))
        q = rng.standard_normal((T, heads * group * d)).astype(np.float32)
        store, k, v = filled(rng, start + T, block, kv_type, heads, d)
        want = attention(q, k, v, start, window)
        for isa in every_isa():
            with using(isa):
                got = store.attend(q, start, window)
            assert error(got, want) < 5e-6, (isa, T, start, block, heads, group, d, window, kv_type)


def test_wrong_arguments_are_refused() -> None:
    store = Store(8, 4, F32, 2, 8)
    q, out = np.zeros((2, 16), np.float32), np.zeros((2, 16), np.float32)

    def attend(**changes: object) -> None:
        arguments = {"q": q, "table": store.table, "block": 4, "kv_type": F32, "start": 0, "kv_heads": 2, "head_dim": 8,
                     "window": 0, "out": out}
        native.attention(**{**arguments, **changes})

    for changes in ({"kv_type": 3}, {"block": 0}, {"start": 7}, {"start": -1}, {"kv_heads": 0}, {"head_dim": 5},
                    {"window": -1}, {"out": out[:1]}, {"table": store.table[:, :1].copy()}, {"kv_heads": 3}):
        with pytest.raises(ValueError):
            attend(**changes)
    with pytest.raises(ValueError, match="too few blocks"):
        store.write(np.zeros((2, 16), np.float32), 0, 7)
    with pytest.raises(ValueError, match="which"):
        store.write(np.zeros((2, 16), np.float32), 2, 0)
