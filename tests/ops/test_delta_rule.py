"""The chunked gated delta rule against the token-by-token one in float64, where it is hardest."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from hybridlm.ops import chunk_gated_delta_rule, documents_of, gated_delta_rule
from hybridlm.ops.chunked import chunk_scan, unit_lower_inverse

torch.set_num_threads(1)


def inputs(seed, time, *, batch=2, key_heads=2, heads=4, key=12, value=20, beta=None, spread=1.0, decay=1.0):
    """q, k, v, g, beta. Keys scatter by `spread` about one direction; g is uniform in [-decay, 0]."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    q, v = normal(batch, time, key_heads, key), normal(batch, time, heads, value)
    k = normal(batch, 1, key_heads, key) + spread * normal(batch, time, key_heads, key)
    g = -decay * torch.rand(batch, time, heads, generator=r)
    b = 2 * torch.sigmoid(2 * normal(batch, time, heads)) if beta is None else \
        beta - 1e-4 * torch.rand(batch, time, heads, generator=r)
    return [q, k, v, g, b], normal(batch, heads, key, value)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


EASY = {}
HARD = {  # name: (inputs)
    "beta near 2, keys near collinear, no decay": {"beta": 2.0, "spread": 1e-2, "decay": 0.0},
    "beta near 2, keys collinear to 1e-4, decay near 1": {"beta": 2.0, "spread": 1e-4, "decay": 1e-5},
    "beta near 2, random keys": {"beta": 2.0, "decay": 1e-3},
    "decay near 0": {"decay": 60.0},
    "decay 0": {"decay": 1e5},
    "decays of every size": {"decay": 8.0, "spread": 0.1},
}


@pytest.mark.parametrize("case", HARD.values(), ids=HARD)
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 257])
def test_float32_is_as_good_as_float32_can_be(case, time):
    x, start = inputs(time, time, **case)
    o, state = chunk_gated_delta_rule(*x, initial_state=start)
    want, want_state = gated_delta_rule(*(t.double() for t in x), initial_state=start.double())
    assert error(o, want) < 1e-6  # required: 1e-5
    assert error(state, want_state) < 2e-6


def test_long_sequence_at_the_edge_of_stability():
    x, _ = inputs(3, 1000, batch=1, key_heads=1, heads=1, key=48, value=96, beta=2.0, spread=1e-2, decay=0.0)
    assert error(chunk_gated_delta_rule(*x)[0], gated_delta_rule(*(t.double() for t in x))[0]) < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_odd_shapes(seed):
    r = random.Random(seed)
    key_heads = r.randint(1, 3)
    x, start = inputs(seed, r.randint(1, 200), batch=r.randint(1, 3), key_heads=key_heads,
                      heads=key_heads * r.randint(1, 3), key=r.randint(1, 40), value=r.randint(1, 40))
    chunk = r.choice([16, 32, 64, 128])
    o, state = chunk_gated_delta_rule(*x, initial_state=start, chunk_size=chunk)
    want, want_state = gated_delta_rule(*(t.double() for t in x), initial_state=start.double())
    assert error(o, want) < 1e-6 and error(state, want_state) < 1e-6
    o64, state64 = chunk_gated_delta_rule(*(t.double() for t in x), initial_state=start.double(), chunk_size=chunk)
    assert error(o64, want) < 1e-13 and error(state64, want_state) < 1e-13


def test_the_reference_is_the_formula():
    """S_t = exp(g)(I - beta k k^T) S_{t-1} + beta k v^T and o_t = S_t^T q / sqrt(K), in numpy, head by head."""
    x, start = inputs(0, 9)
    q, k, v, g, beta = (t.double().numpy() for t in x)
    o, state = gated_delta_rule(*(t.double() for t in x), initial_state=start.double())
    for b in range(2):
        for h in range(4):
            s = start[b, h].double().numpy()
            for t in range(9):
                unit = k[b, t, h // 2] / np.sqrt((k[b, t, h // 2] ** 2).sum() + 1e-6)
                query = q[b, t, h // 2] / np.sqrt((q[b, t, h // 2] ** 2).sum() + 1e-6)
                erase = np.eye(12) - beta[b, t, h] * np.outer(unit, unit)
                s = np.exp(g[b, t, h]) * erase @ s + beta[b, t, h] * np.outer(unit, v[b, t, h])
                np.testing.assert_allclose(o[b, t, h].numpy(), s.T @ query / np.sqrt(12), rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(state[b, h].numpy(), s, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [{}, {"beta": 2.0, "spread": 0.05, "decay": 1e-3}], ids=["plain", "beta near 2"])
def test_bfloat16_stays_at_bfloat16_s_own_level(case):
    x, _ = inputs(1, 300, **case)
    x = [t.bfloat16() for t in x[:3]] + x[3:]
    o, state = chunk_gated_delta_rule(*x)
    want, want_state = gated_delta_rule(*(t.double() for t in x))
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert error(o, want) < 3e-3  # rounding the result alone costs 1.7e-3
    assert error(state, want_state) < 1e-4


# -- several documents in a row --------------------------------------------------------------------------------------

LENGTHS = [1, 70, 3, 64, 130, 1]


def packed(seed):
    x, _ = inputs(seed, sum(LENGTHS), batch=1)
    bounds = np.cumsum([0, *LENGTHS])
    return x, torch.tensor(bounds), [[t[:, a:b] for t in x] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("rule", [gated_delta_rule, chunk_gated_delta_rule])
def test_packed_documents_are_alone(rule):
    x, bounds, parts = packed(5)
    want = torch.cat([rule(*p)[0] for p in parts], 1)
    states = torch.cat([rule(*p)[1] for p in parts])
    by_ids, last = rule(*x, documents=documents_of(bounds, sum(LENGTHS)))
    by_bounds, each = rule(*x, cu_seqlens=bounds)
    for o in (by_ids, by_bounds):
        torch.testing.assert_close(o, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(each, states, rtol=0, atol=1e-6)
    torch.testing.assert_close(last, states[-1:], rtol=0, atol=1e-6)


def test_a_document_cannot_reach_another():
    x, bounds, _ = packed(6)
    documents = documents_of(bounds, sum(LENGTHS))
    x = [t.requires_grad_() for t in x]
    o, _ = chunk_gated_delta_rule(*x, documents=documents)
    o[:, 71:74].sum().backward()
    for i, t in enumerate(x):
        outside = torch.cat([t.grad[:, :71], t.grad[:, 74:]], 1).abs().max()
        # g's gradient is a running sum, in float64, of terms that cancel there; the others are zero term by term
        assert outside <= (1e-12 if i == 3 else 0) and t.grad[:, 71:74].abs().sum() > 0


def test_documents_of_each_row_continue_the_given_states():
    x, _ = inputs(7, 150, batch=1)
    bounds = torch.tensor([0, 40, 150])
    start = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    o, state = chunk_gated_delta_rule(*x, initial_state=start, cu_seqlens=bounds)
    want, want_state = gated_delta_rule(*(t.double() for t in x), initial_state=start.double(), cu_seqlens=bounds)
    assert error(o, want) < 1e-6 and error(state, want_state) < 1e-6


def test_log_decay_of_minus_infinity_forgets():
    x, _ = inputs(8, 100)
    reset = [t.clone() for t in x]
    reset[3][:, 37] = float("-inf")
    reset[3][:, 64] = float("-inf")
    documents = torch.bucketize(torch.arange(100), torch.tensor([37, 64]), right=True)[None].expand(2, -1)
    for rule in (gated_delta_rule, chunk_gated_delta_rule):
        torch.testing.assert_close(rule(*reset)[0], rule(*x, documents=documents)[0], rtol=0, atol=1e-6)


# -- gradients -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 1, 1, 1, 1, 1, 2]])], ids=["one", "packed"])
def test_gradcheck(documents):
    x, start = inputs(0, 7, batch=1, key_heads=1, heads=2, key=2, value=2, spread=0.3)
    x = [t.double().requires_grad_() for t in (*x, start)]

    def rule(*x):
        return chunk_gated_delta_rule(*x[:5], initial_state=x[5], documents=documents, chunk_size=4)

    assert torch.autograd.gradcheck(rule, x)


@pytest.mark.parametrize("case", [{}, {"beta": 2.0, "spread": 0.01, "decay": 0.0}], ids=["plain", "beta near 2"])
def test_gradients_are_the_recurrence_s(case):
    x, start = inputs(4, 150, **case)
    grads = []
    for rule, dtype in ((gated_delta_rule, torch.float64), (chunk_gated_delta_rule, torch.float32)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (*x, start)]
        o, state = rule(*leaves[:5], initial_state=leaves[5])
        r = torch.Generator().manual_seed(9)
        loss = (o * torch.randn(o.shape, generator=r)).sum() + (state * torch.randn(state.shape, generator=r)).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for want, got in zip(*grads, strict=True):
        assert error(got, want) < 2e-5


# -- parts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 2, 16, 64, 128])
def test_triangular_inverse(size):
    """At beta = 2 with equal keys, L is 2 below the diagonal: powers of it grow like 2^n, the inverse does not."""
    r = torch.Generator().manual_seed(size)
    lower = (2 - 0.01 * torch.rand(3, 5, size, size, generator=r)).tril(-1)
    want = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower.double())
    assert error(unit_lower_inverse(lower.double()), want) < 1e-12
    assert error(unit_lower_inverse(lower), want) < 2e-5


def test_scan_operator_is_well_formed():
    r = torch.Generator().manual_seed(0)
    shapes = (3, 2, 4, 4), (3, 2, 4, 5), (3, 2, 1, 1), (2, 4, 5)
    args = [torch.randn(*shape, generator=r).requires_grad_() for shape in shapes]
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(chunk_scan, args, test_utils=checks)
