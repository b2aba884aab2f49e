"""Runs the kernels around the matrix products in Triton's interpreter, in float32, against `reference` in float64.

A program of its own, because Triton decides between interpreter and compiler when it is imported. Prints a JSON object
{case: {name of result: relative error}}.
"""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from hybridlm.ops import reference
from hybridlm.ops.triton import convolution, cross_entropy, gated_norm, rms_norm, swiglu

torch.set_num_threads(1)


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


def compare(ours, exact, inputs):
    """Errors of the outputs and of the gradients of all inputs."""
    mine, wide = ([t.clone().requires_grad_() for t in inputs], [t.double().requires_grad_() for t in inputs])
    got, want = ours(*mine), exact(*wide)
    got, want = ([y] if torch.is_tensor(y) else list(y) for y in (got, want))
    weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(5)) for y in want]
    gradients = torch.autograd.grad(got, mine, weights)
    exact_gradients = torch.autograd.grad(want, wide, [w.double() for w in weights])
    return {**{f"out {i}": error(a, b) for i, (a, b) in enumerate(zip(got, want, strict=True))},
            **{f"d {i}": error(a, b) for i, (a, b) in enumerate(zip(gradients, exact_gradients, strict=True))}}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def norms(rows, width, scale=1.0):
    x, residual, w = normal(rows, width) * scale, normal(rows, width, seed=1) * scale, normal(width)
    wide = normal(rows, width + 3) * scale  # rows that do not lie end to end
    return {
        "rms_norm": compare(lambda x, w: rms_norm.rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6),
                            (x, w)),
        "add_rms_norm": compare(lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-6),
                                lambda x, r, w: (reference.rms_norm(x + r, w, 1e-6), x + r), (x, residual, w)),
        "gated_rms_norm": compare(lambda x, g, w: gated_norm.gated_rms_norm(x[:, :-3], g, w, 1e-5),
                                  lambda x, g, w: reference.gated_rms_norm(x[:, :-3], g, w, 1e-5), (wide, residual, w)),
        "swiglu": compare(swiglu.swiglu, reference.swiglu, (torch.cat([x, residual], 1),)),
    }


def convolutions(batch, time, groups, width, *, state=False, documents=None):
    channels = sum(groups)
    before = normal(batch, width - 1, channels) if state else None
    ids = None if documents is None else torch.tensor(documents).cumsum(0).expand(batch, -1)

    def exact(x, *weights):
        states = [None] * len(groups) if before is None else before.double().split(groups, -1)
        return [reference.short_convolution(part, w, s, ids)[0]
                for part, w, s in zip(x.split(groups, -1), weights, states, strict=True)]

    x = (normal(batch, time, channels), *(normal(c, width) for c in groups))
    return {"convolution": compare(lambda x, *w: convolution.short_convolution(x, list(w), before, ids), exact, x)}


def loss(rows, vocabulary, z, scale=1.0):
    logits = normal(rows, vocabulary + 2)[:, :vocabulary] * scale  # rows that do not lie end to end
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    targets[rows // 2] = -100
    wide = logits.double().requires_grad_()
    want = reference.cross_entropy(wide, targets, z)
    want.sum().backward()
    got = cross_entropy.cross_entropy_(logits, targets, z)
    return {"loss": {"losses": error(got, want), "d logits": error(logits, wide.grad)}}


CASES = {
    "one row": lambda: norms(1, 3),
    "odd": lambda: norms(7, 5),
    "more rows than a tile, and than the programs of backward": lambda: norms(150, 96),
    "a row longer than a tile": lambda: norms(3, 5000),
    "large": lambda: norms(5, 40, 1e4),
    "small": lambda: norms(5, 40, 1e-4),
    "convolution of one token after others": lambda: convolutions(2, 1, (5,), 4, state=True),
    "convolution of groups, documents": lambda: convolutions(1, 37, (5, 130, 7), 4,
                                                             documents=[0, 0, 0, 1, 1] + [0] * 27 + [1] + [0] * 4),
    "convolution over several spans": lambda: convolutions(2, 70, (40, 9), 4),
    "convolution over several spans, documents": lambda: convolutions(2, 70, (40, 9), 4,
                                                                      documents=([0] * 30 + [1]) * 2 + [0] * 7 + [1]),
    "convolution of width 3 after others": lambda: convolutions(1, 140, (64,), 3, state=True),
    "convolution of width 2": lambda: convolutions(1, 33, (3, 4), 2),
    "loss": lambda: loss(5, 11, 0.0),
    "loss with z": lambda: loss(3, 300, 1e-2),
    "loss over several blocks, large logits": lambda: loss(2, 20_000, 1e-4, 30.0),
}


def main():
    found = {}
    for name, case in CASES.items():
        found[name] = {f"{what} {part}": e for what, errors in case().items() for part, e in errors.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
