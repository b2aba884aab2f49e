"""Runs the kernels of a decoding step in Triton's interpreter, in float32, against plain PyTorch in float64.

A program of its own, because Triton decides between interpreter and compiler when it is imported. Prints a JSON object
{case: largest relative error}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from tests.ops.triton import decode_cases as cases

torch.set_num_threads(1)

found = {
    "step": cases.gdn(3, 2, 4, 12, 24),
    "step of the 7B's head": cases.gdn(2, 1, 1, 96, 192),
    "step, K = V = 128": cases.gdn(2, 1, 1, 128, 128, W=2),
    "step, odd": cases.gdn(2, 3, 3, 20, 36, W=3),
    "product": cases.linear(3, 100, 96),
    "product, odd": cases.linear(17, 70, 100),
    "product, split": cases.linear(3, 70, 300, split=3),
    "product, gated": cases.linear(3, 70, 96, glu=True),
    "product, gated, split": cases.linear(3, 70, 300, glu=True, split=2),
    "product, many rows": cases.linear(130, 70, 300, split=3),
    "product, many rows, gated": cases.linear(70, 70, 130, glu=True),
    "attention": cases.paged([1, 70, 200, 64], 4, 2, 16),
    "attention, long": cases.paged([2500], 2, 2, 16, rope=False),
    "attention, window": cases.paged([1, 70, 200, 64], 4, 2, 24, window=70),
    "sums and norms": cases.add_norm(3, 100),
}
print(json.dumps({name: max(value.values()) if isinstance(value, dict) else value for name, value in found.items()}))
