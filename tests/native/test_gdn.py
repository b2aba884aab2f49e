"""The Gated DeltaNet mixer against its maths in float64: both forms, all shapes, extremes, pieces, history."""

from __future__ import annotations

import numpy as np
import pytest
from tests.native.mixer_reference import Mixer, error, every_isa, pieces, using

from hybridlm import native

ISAS = pytest.mark.parametrize("isa", every_isa())
SHAPES = [  # T, Hk, group, K, V, W
    (1, 1, 1, 1, 1, 4), (1, 2, 3, 5, 7, 4), (1, 3, 1, 96, 192, 4), (3, 2, 1, 96, 192, 4), (16, 1, 2, 33, 65, 4),
    (17, 2, 1, 96, 192, 4), (40, 1, 1, 1, 1, 4), (33, 2, 2, 12, 24, 4), (64, 1, 3, 17, 19, 3), (50, 1, 1, 128, 128, 4),
    (31, 2, 1, 48, 96, 1), (100, 1, 1, 64, 48, 2), (70, 1, 2, 20, 200, 7), (5, 1, 1, 200, 5, 9), (80, 1, 1, 7, 129, 4),
]


@ISAS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunked", [True, False])
def test_equals_the_recurrence(isa: str, shape: tuple[int, ...], chunked: bool, rng: np.random.Generator) -> None:
    mixer = Mixer.random(rng, *shape, negative=bool(rng.integers(2)))
    narrow = min(shape[3:5]) < 8  # where the norm magnifies what is left of a small o, and errors have no company
    for m, bound in ((mixer, 2e-4 if narrow else 2e-5), (mixer.plain(), 3e-5 if narrow else 4e-6)):
        out, conv_state, state, _ = m.reference()
        moved = m.fresh()
        with using(isa):
            got = moved.run(chunked)
        assert error(got, out) < bound
        assert error(moved.state, state) < (3e-5 if narrow else 3e-6)
        assert np.array_equal(moved.conv_state, conv_state.astype(np.float32))


@ISAS
@pytest.mark.parametrize("chunked", [True, False])
def test_beta_near_2_and_keys_nearly_alike(isa: str, chunked: bool, rng: np.random.Generator) -> None:
    """Nothing fades and every step reflects: errors of 300 steps all survive to the end."""
    m = Mixer.hard(rng, 300, 1, 1, 96, 192).plain()
    out, _, state, _ = m.reference()
    moved = m.fresh()
    with using(isa):
        got = moved.run(chunked)
    assert error(got, out) < 1e-5
    assert error(moved.state, state) < 1.2e-5


@ISAS
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("a", [-np.inf, -1e30, -60.0, 40.0, 1e3, 1e30, np.inf])
def test_extreme_gates(isa: str, chunked: bool, a: float, rng: np.random.Generator) -> None:
    """Decay from exactly 1 to exactly 0, for some tokens or all: finite, and what the recurrence gives."""
    m = Mixer.random(rng, 40, 2, 1, 24, 40)
    m.a[:, 0] = a
    m.a[rng.random(40) < 0.3, 1] = a
    m.b[rng.random(40) < 0.3, 0] = -np.inf
    m.b[rng.random(40) < 0.3, 0] = np.inf
    m.gate[rng.random(m.gate.shape) < 0.1] = -np.inf
    with np.errstate(invalid="ignore"):
        out, _, state, _ = m.reference()
    out = np.where(np.isneginf(m.gate), 0, out)
    moved = m.fresh()
    with using(isa):
        got = moved.run(chunked)
    assert error(got, out) < 2e-5
    assert error(moved.state, state) < 3e-6


@ISAS
def test_slow_decay_over_many_tokens(isa: str, rng: np.random.Generator) -> None:
    """exp(-1e-5) rounded to float32 would be off by 2e-8 a token, always the same way: 6e-5 at the end."""
    m = Mixer.random(rng, 3000, 1, 1, 4, 8)
    m.ssm_a[:], m.dt_bias[:], m.a[:], m.b[:] = -1e-5, 0, 0.54, -40
    m.state[:] = 1 + rng.random(m.state.shape)
    _, _, state, _ = m.reference()
    for chunked in (True, False):
        moved = m.fresh()
        with using(isa):
            moved.run(chunked)
        assert error(moved.state, state) < 1.5e-5


@ISAS
def test_tokens_one_by_one_equal_a_short_call_bit_for_bit(isa: str, rng: np.random.Generator) -> None:
    shapes = [(16, 2, 2, 96, 192, 4), (9, 1, 1, 33, 70, 4), (5, 3, 1, 5, 3, 3), (12, 1, 1, 64, 64, 4)]
    for T, *shape in shapes:
        m = Mixer.random(rng, T, *shape)
        at_once, by_one, slow = m.fresh(), m.fresh(), m.fresh()
        with using(isa):
            out = at_once.run()
            single = np.concatenate([by_one.part(t, t + 1).run() for t in range(T)])
            assert np.array_equal(slow.run(chunked=False), out)
        assert np.array_equal(single, out)
        assert np.array_equal(by_one.state, at_once.state)
        assert np.array_equal(by_one.conv_state, at_once.conv_state)


@ISAS
def test_pieces_equal_the_whole(isa: str, rng: np.random.Generator) -> None:
    """Bit for bit where cuts fall on multiples of 16 and pieces are longer than 16; else to rounding."""
    m = Mixer.random(rng, 160, 2, 1, 24, 48)
    whole, even, uneven = m.fresh(), m.fresh(), m.fresh()
    with using(isa):
        out = whole.run()
        split = np.concatenate([even.part(a, b).run() for a, b in ((0, 48), (48, 128), (128, 160))])
        loose = np.concatenate([uneven.part(a, b).run() for a, b in pieces(rng, 160)])
    assert np.array_equal(split, out) and np.array_equal(even.state, whole.state)
    assert error(loose, out.astype(np.float64)) < 2e-5
    assert error(uneven.state, whole.state.astype(np.float64)) < 3e-6
    assert np.array_equal(uneven.conv_state, whole.conv_state)


@ISAS
@pytest.mark.parametrize("shape", [(1, 2, 1, 96, 192, 4), (6, 2, 2, 12, 24, 4), (20, 1, 1, 33, 65, 4)])
def test_history_holds_the_state_after_each_token(isa: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    m = Mixer.random(rng, *shape)
    T, (Hv, K, V) = shape[0], m.state.shape
    history = np.full((T, Hv, K, V), np.nan, np.float32)
    moved, plain = m.fresh(), m.fresh()
    with using(isa):
        out = moved.run(history=history)
        assert np.array_equal(out, plain.run(chunked=False))
    assert error(history, m.reference()[3]) < 3e-6
    assert np.array_equal(history[-1], moved.state) and np.array_equal(moved.state, plain.state)


@ISAS
def test_results_do_not_depend_on_threads(isa: str, rng: np.random.Generator) -> None:
    for T in (1, 4, 50):
        m = Mixer.random(rng, T, 7, 2, 24, 40)
        results = []
        for threads in (1, 2, 4):
            moved = m.fresh()
            with using(isa, threads):
                results.append((moved.run(), moved.state, moved.conv_state))
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_random_shapes(rng: np.random.Generator) -> None:
    for _ in range(25):
        shape = (int(rng.integers(1, 70)), int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 50)),
                 int(rng.integers(1, 90)), int(rng.integers(1, 7)))
        m = Mixer.random(rng, *shape, negative=bool(rng.integers(2)))
        out, conv_state, state, _ = m.reference()
        for isa in every_isa():
            moved = m.fresh()
            with using(isa):
                got = moved.run()
            narrow = min(shape[3:5]) < 8
            assert error(got, out) < (2e-4 if narrow else 2e-5), (isa, shape)
            assert error(moved.state, state) < (3e-5 if narrow else 3e-6), (isa, shape)
            assert np.array_equal(moved.conv_state, conv_state.astype(np.float32)), (isa, shape)


def test_no_tokens_change_nothing(rng: np.random.Generator) -> None:
    m = Mixer.random(rng, 3, 1, 1, 8, 8)
    moved = m.fresh()
    moved.part(0, 0).run()
    assert np.array_equal(moved.state, m.state) and np.array_equal(moved.conv_state, m.conv_state)


def test_wrong_shapes_are_refused(rng: np.random.Generator) -> None:
    good = Mixer.random(rng, 3, 2, 2, 8, 4)
    for name in ("k", "v", "a", "b", "gate", "conv_q", "conv_k", "conv_v", "ssm_a", "dt_bias", "norm", "conv_state"):
        m = good.fresh()
        setattr(m, name, np.ascontiguousarray(getattr(m, name)[..., :-1]))
        if name == "conv_q":  # decides the number of taps; then the others do not fit
            name = "conv_k"
        with pytest.raises(ValueError, match=f"{name} must"):
            m.run()
    m = good.fresh()
    m.state = np.zeros((3, 8, 4), np.float32)
    with pytest.raises(ValueError, match="multiple of key heads"):
        m.run()
    with pytest.raises(ValueError, match="history must"):
        good.fresh().run(history=np.zeros((2, 4, 8, 4), np.float32))
    m = good.fresh()
    m.state = m.state.astype(np.float64)
    with pytest.raises(TypeError):
        m.run()
    assert native.threads() >= 1
