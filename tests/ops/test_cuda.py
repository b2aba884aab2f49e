"""The operations on a GPU, in bfloat16, against the specification in float64 on the same inputs.

The bounds are what rounding the results to bfloat16 costs (relative error 1.7e-3), and a little for sums in between.
"""

import pytest
import torch
import torch.nn.functional as F

from hybridlm import ops
from hybridlm.ops import cross_entropy as room
from hybridlm.ops import delta_rule, pointwise, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BF16 = torch.bfloat16


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(ours, exact, inputs, bound=2.5e-3, compile=False):
    """Outputs and gradients of all inputs, twice the same bit for bit; if asked, compiled as well."""
    wide = [t.double().requires_grad_() for t in inputs]
    want = exact(*wide)
    want = [want] if torch.is_tensor(want) else list(want)
    slopes = [torch.randn_like(y, dtype=torch.float32).to(BF16) for y in want]
    want += torch.autograd.grad(want, wide, [s.double() for s in slopes])

    def run(function):
        leaves = [t.clone().requires_grad_() for t in inputs]
        got = function(*leaves)
        got = [got] if torch.is_tensor(got) else list(got)
        return got + list(torch.autograd.grad(got, leaves, [s.to(y.dtype) for s, y in zip(slopes, got, strict=True)]))

    eager, again = run(ours), run(ours)
    for i, exact_value in enumerate(want):
        assert error(eager[i], exact_value) < bound, f"result {i}: {error(eager[i], exact_value):.1e}"
        assert torch.equal(eager[i], again[i]), f"result {i} differs between two runs"
    if compile:
        for i, value in enumerate(run(torch.compile(ours, fullgraph=True, dynamic=False))):
            assert error(value, want[i]) < bound, f"result {i}, compiled: {error(value, want[i]):.1e}"


@pytest.mark.parametrize("rows, width", [(1, 16), (333, 768), (5, 3840), (3000, 192)])
def test_norms_and_swiglu(rows, width):
    x, y, w = normal(rows, width), normal(rows, width), normal(width, dtype=torch.float32)
    compile = rows == 333
    check(lambda x, w: ops.rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6), (x, w), compile=compile)
    check(lambda x, y, w: ops.gated_rms_norm(x, y, w, 1e-5), lambda x, y, w: reference.gated_rms_norm(x, y, w, 1e-5),
          (x, y, w), compile=compile)
    check(ops.swiglu, reference.swiglu, (torch.cat([x, y], 1),), compile=compile)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch, time, groups", [(1, 1, (16,)), (2, 333, (96, 96, 192)), (1, 4096, (576, 576, 1152))])
def test_convolutions(batch, time, groups, packed):
    documents = (torch.rand(batch, time, device="cuda") < 0.02).long().cumsum(1) if packed else None

    def exact(x, *weights):
        return [reference.short_convolution(part, w, None, documents)[0]
                for part, w in zip(x.split(groups, -1), weights, strict=True)]

    check(lambda x, *w: ops.short_convolutions(x, list(w), None, documents)[0], exact,
          (normal(batch, time, sum(groups)), *(normal(c, 4, dtype=torch.float32) for c in groups)),
          compile=packed and batch == 2)


@torch.no_grad()
def test_a_convolution_goes_on_from_its_state():
    x, w = normal(2, 100, 192), [normal(c, 4, dtype=torch.float32) for c in (64, 128)]
    whole, last = ops.short_convolutions(x, w)
    state, parts = None, []
    for piece in x.split([1, 2, 57, 40], 1):
        outputs, state = ops.short_convolutions(piece, w, state)
        parts.append(outputs)
    assert torch.equal(last, state)
    for i, want in enumerate(whole):
        assert torch.equal(torch.cat([p[i] for p in parts], 1), want)


@pytest.mark.parametrize("time, window, packed, kv_heads", [
    (128, None, False, 4), (100, 70, False, 1), (1000, None, True, 4), (333, 70, True, 2)])
def test_attention(time, window, packed, kv_heads):
    documents = (torch.rand(2, time, device="cuda") < 0.02).long().cumsum(1) if packed else None
    inputs = normal(2, time, 4, 64), normal(2, time, kv_heads, 64), normal(2, time, kv_heads, 64)
    mask = ops.attention_mask(time, window=window, documents=documents, device=inputs[0].device)
    check(lambda q, k, v: ops.fused_attention(q, k, v, window=window, documents=documents, mask=mask),
          lambda q, k, v: reference.attention(q, k, v, window=window, documents=documents), inputs, 8e-3, time == 333)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_linear_cross_entropy(dtype, monkeypatch):
    monkeypatch.setitem(room.LOGITS, "cuda", 300_000)
    hidden, weight = normal(700, 64, dtype=dtype), normal(1003, 64, dtype=torch.float32) / 8
    targets = torch.randint(1003, (700,), device="cuda")
    targets[:9] = -100
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    want = reference.cross_entropy(wide[0] @ wide[1].T, targets, 1e-3).sum() / 7
    want.backward()
    given = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss = ops.linear_cross_entropy(*given, targets, 1e-3) / 7
    loss.backward()
    assert error(loss.detach(), want.detach()) < 1e-3
    for mine, theirs in zip(given, wide, strict=True):
        assert mine.grad.dtype == mine.dtype and error(mine.grad, theirs.grad) < 6e-3


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_training_step_is_as_near_to_float64_as_pytorchs_own_in_bfloat16(packed):
    from hybridlm.config import FULL, LINEAR, HybridConfig, Rope
    from hybridlm.model import HybridLM

    config = HybridConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=2,
                          layer_types=(LINEAR, LINEAR, FULL), rope=Rope(1e4))
    ids = torch.randint(512, (2, 257), device="cuda")
    documents = (torch.rand(2, 256, device="cuda") < 0.02).long().cumsum(1) if packed else None

    def gradients(dtype, fast):
        model = HybridLM(config).cuda()
        if dtype == torch.float64:
            model = model.double()
        model.compute_dtype = dtype
        if fast:
            model.compile_blocks()
        hidden = model.hidden(ids[:, :-1], documents=documents).flatten(0, 1)
        if fast:
            loss = ops.linear_cross_entropy(hidden, model.head_weight, ids[:, 1:].flatten())
        else:
            loss = F.cross_entropy((hidden @ model.head_weight.to(dtype).T).to(torch.promote_types(dtype, torch.float)),
                                   ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
        return torch.cat([p.grad.double().flatten() for _, p in sorted(model.named_parameters())])

    exact = gradients(torch.float64, False)
    ours = error(gradients(BF16, True), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointwise, "on_triton", lambda x: False)
        patch.setattr(delta_rule, "takes", lambda *x: False)
        plain = error(gradients(BF16, False), exact)
    assert ours < 1.2 * plain + 1e-3, (ours, plain)
