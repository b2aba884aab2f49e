"""Norms, activations, rotation: every instruction set against float64, at widths that fill no vector."""

from __future__ import annotations

import numpy as np
import pytest
from tests.native.mixer_reference import error, every_isa, sigmoid, silu, using

from hybridlm import native
from hybridlm.native import _native

pytestmark = pytest.mark.parametrize("isa", every_isa())
SHAPES = [(1, 1), (1, 384), (3, 17), (7, 31), (2, 3840), (65, 130), (300, 257)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(isa: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    x = (rng.standard_normal(shape) * np.exp(rng.normal(0, 4, (shape[0], 1)))).astype(np.float32)
    weight = rng.standard_normal(shape[1]).astype(np.float32)
    out = np.full_like(x, np.nan)
    with using(isa):
        native.rms_norm(x, weight, 1e-6, out)
    wide = x.astype(np.float64)
    want = weight * wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)
    assert error(out, want) < 5e-7


def test_rms_norm_of_zeros_and_in_place(isa: str) -> None:
    x = np.zeros((2, 33), np.float32)
    with using(isa):
        native.rms_norm(x, np.ones(33, np.float32), 1e-6, x)
    assert (x == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_add(isa: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    gate, up = (6 * rng.standard_normal((2, *shape))).astype(np.float32)
    out = np.full_like(gate, np.nan)
    with using(isa):
        native.swiglu(gate, up, out)
        want = silu(gate.astype(np.float64)) * up
        assert error(out, want) < 5e-7
        total = gate.copy()
        native.add(total, up)
    assert np.array_equal(total, gate + up)


def test_activations_to_the_last_bits(isa: str) -> None:
    """exp within 1.5 units in the last place, what divides by 1 + exp within 3; extremes exactly."""
    x = np.concatenate([np.linspace(-87, 88.7, 100_003), np.linspace(-1, 1, 10_001)]).astype(np.float32)
    out = np.empty((3, len(x)), np.float32)
    with using(isa):
        _native._activations(x, out)
        wide = x.astype(np.float64)
        for got, want, bound in zip(out, (np.exp(wide), sigmoid(wide), silu(wide)), (1.5, 3, 3), strict=True):
            ulp = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
            assert (np.abs(got - want) <= bound * np.maximum(ulp, 1e-37)).all()
        edge = np.array([-np.inf, -3e38, -200, 0, 89, np.inf, np.nan], np.float32)
        out = np.empty((3, len(edge)), np.float32)
        _native._activations(edge, out)
    assert np.array_equal(out[0], np.float32([0, 0, 0, 1, np.inf, np.inf, np.nan]), equal_nan=True)
    assert np.array_equal(out[1], np.float32([0, 0, 0, 0.5, 1, 1, np.nan]), equal_nan=True)
    assert np.array_equal(out[2], np.float32([0, 0, 0, 0, 89, np.inf, np.nan]), equal_nan=True)


@pytest.mark.parametrize(("heads", "d"), [(1, 2), (3, 64), (2, 130), (5, 22), (30, 128)])
def test_rope(isa: str, heads: int, d: int, rng: np.random.Generator) -> None:
    """Angles up to 131,072 rad keep the accuracy of small ones."""
    positions = np.array([0, 1, 5, 4095, 65_535, 131_071], np.int32)
    inv_freq = (500_000.0 ** -(np.arange(d // 2) * 2 / d)).astype(np.float32)
    x = rng.standard_normal((len(positions), heads * d)).astype(np.float32)
    angle = positions[:, None, None].astype(np.float64) * inv_freq.astype(np.float64)
    halves = x.astype(np.float64).reshape(len(positions), heads, 2, d // 2)
    a, b = halves[:, :, 0], halves[:, :, 1]
    want = 1.25 * np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=2)
    got = x.copy()
    with using(isa):
        native.rope(got, positions, inv_freq, 1.25)
    assert np.abs(got - want.reshape(x.shape)).max() < 1e-6


def test_results_do_not_depend_on_threads(isa: str, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 257, 1000)).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        with using(isa, threads):
            normed, mixed, total, turned = np.empty_like(x), np.empty_like(x), x.copy(), x.copy()
            native.rms_norm(x, y[0], 1e-6, normed)
            native.swiglu(x, y, mixed)
            native.add(total, y)
            native.rope(turned, np.arange(257, dtype=np.int32), np.ones(50, np.float32), 1.0)
            results.append((normed, mixed, total, turned))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_wrong_shapes_are_refused(isa: str) -> None:
    x = np.zeros((2, 8), np.float32)
    with using(isa):
        for bad in (
            lambda: native.rms_norm(x, np.ones(7, np.float32), 1e-6, x),
            lambda: native.rms_norm(x, np.ones(8, np.float32), 1e-6, np.empty((2, 7), np.float32)),
            lambda: native.swiglu(x, x[:1], x),
            lambda: native.add(x, np.zeros((2, 9), np.float32)),
            lambda: native.rope(x, np.zeros(2, np.int32), np.ones(3, np.float32), 1.0),
            lambda: native.rope(x, np.zeros(3, np.int32), np.ones(2, np.float32), 1.0),
        ):
            with pytest.raises(ValueError, match=r"must"):
                bad()
        for bad in (
            lambda: native.add(x.astype(np.float64), x),
            lambda: native.add(np.zeros((2, 16), np.float32)[:, ::2], x),
        ):
            with pytest.raises(TypeError):
                bad()
