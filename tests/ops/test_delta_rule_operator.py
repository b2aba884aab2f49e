"""The gated delta rule as an operator: what it takes, the shapes it promises to the compiler; with a GPU, that it is
right, repeatable, and taken whole by torch.compile and CUDA graphs."""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hybridlm.ops import chunk_gated_delta_rule, delta_rule, documents_of, gated_delta_rule

gpu = pytest.mark.gpu


def inputs(device, batch=2, time=100, key_heads=2, heads=4, key=96, value=192, dtype=torch.bfloat16, seed=0, decay=0.1,
           beta=None, spread=None):
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    k = normal(batch, time, key_heads, key)
    if spread is not None:
        k = normal(batch, 1, key_heads, key) + spread * k
    b = 2 * torch.sigmoid(2 * normal(batch, time, heads)) if beta is None else \
        beta - 1e-3 * torch.rand(batch, time, heads, generator=r)
    x = [normal(batch, time, key_heads, key).to(dtype), k.to(dtype), normal(batch, time, heads, value).to(dtype),
         -decay * torch.rand(batch, time, heads, generator=r), b]
    return [t.to(device) for t in x], normal(batch, heads, key, value).to(device)


def test_a_cpu_keeps_to_pytorch():
    x, _ = inputs("cpu")
    assert not delta_rule.takes(*x[:3])


@pytest.mark.parametrize("bounds", [None, 5])
@pytest.mark.parametrize("native", [False, True])
def test_shapes_are_known_before_anything_runs(monkeypatch, bounds, native):
    monkeypatch.setattr(delta_rule, "_native", lambda q, v: native)
    with FakeTensorMode(), torch.no_grad():
        q, k = (torch.empty(1, 300, 2, 96, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        v = torch.empty(1, 300, 4, 192, dtype=torch.bfloat16, device="cuda")
        g, beta = (torch.empty(1, 300, 4, device="cuda") for _ in range(2))
        start = torch.empty(1 if bounds is None else bounds - 1, 4, 96, 192, device="cuda")
        places = None if bounds is None else torch.empty(bounds, dtype=torch.int32, device="cuda")
        o, state = delta_rule.fused_gated_delta_rule(q, k, v, g, beta, initial_state=start, cu_seqlens=places)
        assert o.shape == v.shape and o.dtype == v.dtype
        assert state.shape == start.shape and state.dtype == torch.float32
        rest = q, k, v, g, beta, start
        assert delta_rule.gated_delta_rule(*rest, places, True, False)[2].numel() == 0
        records = delta_rule.gated_delta_rule(*rest, places, True, True)[2]
        assert records.shape[:2] == (5 + (0 if bounds is None else bounds - 1), 4) if native else records.numel() == 0
        grads = delta_rule.gated_delta_rule_backward(o, state, *rest, places, records, True)
        for grad, x in zip(grads, rest, strict=True):
            assert grad.shape == x.shape and grad.dtype == x.dtype


# -- with a GPU ------------------------------------------------------------------------------------------------------

def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def gradients(rule, x, start, **kw):
    leaves = [t.detach().clone().requires_grad_() for t in (*x, start)]
    o, state = rule(*leaves[:5], initial_state=leaves[5], **kw)
    r = torch.Generator("cuda").manual_seed(9)
    do, dstate = (torch.randn(t.shape, generator=r, device="cuda") for t in (o, state))
    loss = (o.double() * do.bfloat16()).sum() + (state.double() * dstate).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


@gpu
@pytest.mark.parametrize("case, limit", [
    ({}, 6e-3), ({"time": 1}, 6e-3), ({"time": 64, "key": 128, "value": 128}, 6e-3), ({"key": 48, "value": 80}, 6e-3),
    ({"key": 256, "value": 256, "time": 130}, 6e-3), ({"dtype": torch.float16}, 2e-3), ({"decay": 20.0}, 6e-3),
    ({"beta": 2.0, "spread": 0.05, "decay": 1e-3, "time": 300}, 1.2e-1),  # fla: 0.2
], ids=str)
def test_results_and_gradients(case, limit):
    x, start = inputs("cuda", **case)
    assert delta_rule.takes(*x[:3])
    want = gradients(gated_delta_rule, [t.double() for t in x], start.double())
    for got, right in zip(gradients(chunk_gated_delta_rule, x, start), want, strict=True):
        assert error(got, right) < limit


@gpu
def test_packed_documents_by_either_description():
    lengths = [1, 70, 3, 64, 130, 1]
    x, _ = inputs("cuda", batch=1, time=sum(lengths))
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    alone = [chunk_gated_delta_rule(*(t[:, a:b] for t in x)) for a, b in pairwise(bounds.tolist())]
    o, states = chunk_gated_delta_rule(*x, cu_seqlens=bounds)
    assert torch.equal(o, torch.cat([y for y, _ in alone], 1))
    assert torch.equal(states, torch.cat([s for _, s in alone]))
    o, last = chunk_gated_delta_rule(*x, documents=documents_of(bounds, sum(lengths)))
    assert error(o, torch.cat([y for y, _ in alone], 1).double()) < 5e-3
    assert error(last, alone[-1][1].double()) < 5e-3


@gpu
def test_the_same_bits_every_time():
    x, start = inputs("cuda", time=500)
    first, second = (gradients(chunk_gated_delta_rule, x, start) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
def test_compiled_whole_and_replayed():
    x, start = inputs("cuda", time=200)
    want = gradients(chunk_gated_delta_rule, x, start)
    compiled = torch.compile(chunk_gated_delta_rule, fullgraph=True)
    for got, right in zip(gradients(compiled, x, start), want, strict=True):
        assert torch.equal(got, right)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o, state = chunk_gated_delta_rule(*x, initial_state=start)
    o.zero_()
    graph.replay()
    assert torch.equal(o, want[0]) and torch.equal(state, want[1])


@gpu
def test_operator_is_well_formed():
    x, start = inputs("cuda", time=70)
    args = [t.requires_grad_() for t in (*x, start)]
    torch.library.opcheck(delta_rule.gated_delta_rule, (*args, None, True),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
