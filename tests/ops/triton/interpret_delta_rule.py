"""Runs the kernels of the gated delta rule in Triton's interpreter, in float32, against the recurrence in float64.

A program of its own, because Triton decides between interpreter and compiler when kernels are defined. Prints a JSON
object {case: {name of result: relative error}}.
"""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from hybridlm.ops import gated_delta_rule
from hybridlm.ops.triton import delta_rule

torch.set_num_threads(1)


def inputs(seed, time, *, batch=1, key_heads=1, heads=1, key=32, value=32, beta=None, spread=None, decay=1.0):
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    k = normal(batch, time, key_heads, key)
    if spread is not None:
        k = normal(batch, 1, key_heads, key) + spread * k
    b = 2 * torch.sigmoid(2 * normal(batch, time, heads)) if beta is None else torch.full((batch, time, heads), beta)
    g = -decay * torch.rand(batch, time, heads, generator=r)
    return [normal(batch, time, key_heads, key), k, normal(batch, time, heads, value), g, b], \
        normal(batch, heads, key, value)


def compare(x, start, *, bounds=None, norm=True, backward=True):
    leaves = [t.double().requires_grad_() for t in (*x, start)]
    o, state = gated_delta_rule(*leaves[:5], initial_state=leaves[5], cu_seqlens=bounds, qk_l2norm=norm)
    r = torch.Generator().manual_seed(9)
    do, dstate = torch.randn(o.shape, generator=r), torch.randn(state.shape, generator=r)
    want = {"o": o.detach(), "state": state.detach()}
    got = dict(zip(("o", "state"), delta_rule.forward(*x, start, bounds, norm), strict=True))
    if backward:
        names = ("dq", "dk", "dv", "dg", "dbeta", "dstart")
        want |= dict(zip(names, torch.autograd.grad((o * do).sum() + (state * dstate).sum(), leaves), strict=True))
        got |= dict(zip(names, delta_rule.backward(do, dstate, *x, start, bounds, norm), strict=True))
    return {name: float((got[name].double() - y).norm() / y.norm()) for name, y in want.items()}


def forgetting():
    x, start = inputs(8, 100)
    x[3][:, 37] = x[3][:, 38] = float("-inf")
    return compare(x, start)


def packed(lengths):
    x, _ = inputs(3, sum(lengths), heads=2)
    start = torch.randn(len(lengths), 2, 32, 32, generator=torch.Generator().manual_seed(1))
    return compare(x, start, bounds=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


def silent():
    x, start = inputs(5, 70)
    x[4][:, 10:30] = 0
    return compare(x, start)


CASES = {
    "the shape of Olmo Hybrid": lambda: compare(*inputs(0, 130, key=96, value=192)),
    "one token": lambda: compare(*inputs(1, 1, key=96, value=64)),
    "a whole chunk": lambda: compare(*inputs(2, 64)),
    "grouped heads, two rows": lambda: compare(*inputs(3, 65, batch=2, heads=2, value=48)),
    "widths that are no powers of two": lambda: compare(*inputs(4, 70, key=48, value=80)),
    "a padded second key block": lambda: compare(*inputs(4, 40, key=112, value=16)),
    "without norms": lambda: compare(*inputs(5, 40, key=16, value=16, spread=0.1, beta=0.01), norm=False),
    "beta near 2, keys near collinear, no decay": lambda: compare(*inputs(6, 130, beta=1.9999, spread=1e-2, decay=0)),
    "decay near 0": lambda: compare(*inputs(7, 100, decay=60.0)),
    "a decay of minus infinity": forgetting,
    "beta near 0": lambda: compare(*inputs(9, 70, beta=1e-6)),
    "beta 0": silent,
    "packed documents": lambda: packed([1, 0, 70, 64, 3, 0]),
    "one packed document": lambda: packed([65]),
}

if __name__ == "__main__":
    print(json.dumps({name: case() for name, case in CASES.items()}))
