"""Runs the GPU engine with Triton's kernels in the interpreter, against float64. A program of its own, because Triton
decides between interpreter and compiler when it is imported. Prints a JSON object {case: largest error of logits}."""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from tests.engine.device import device_engine
from tests.engine.helpers import random_tensors, reference_engine, small_config

from hybridlm.config import FULL, LINEAR, SLIDING, Rope

torch.set_num_threads(1)
torch.set_grad_enabled(False)


def steps(config, seed):
    """Three sequences of different lengths, prompts and then steps together; one with guesses taken back."""
    rng = np.random.default_rng(seed)
    tensors = random_tensors(config, rng)
    engines = device_engine(config, tensors=tensors, kernels=True), reference_engine(config, tensors=tensors)
    texts = [rng.integers(0, config.vocab_size, n).tolist() for n in (62, 5, 1)]
    rows = []
    for engine in engines:
        sessions = [engine.session() for _ in texts]
        found = [engine.step(list(zip(sessions, texts, strict=True)))]
        for t in range(4):
            found.append(engine.step([(s, [t + i]) for i, s in enumerate(sessions)]))
        found.append(engine.step([(sessions[0], [3, 1, 2]), (sessions[1], [4])]))  # steps beside a longer stretch
        found.append(engine.step([(sessions[2], [5, 6, 7])], every=True, trial=True))
        sessions[2].take_back(2)
        found.append(engine.step([(s, [9]) for s in sessions]))
        rows.append(np.concatenate(found))
    return float(np.abs(rows[0] - rows[1]).max())


print(json.dumps({
    "both kinds of layer": steps(small_config(), 0),
    "windows and few keys": steps(small_config(
        layer_types=(SLIDING, LINEAR, FULL), num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
        sliding_window=40, sliding_rope=Rope(10_000.0), linear_num_key_heads=1, linear_num_value_heads=2,
        linear_conv_kernel_dim=2, linear_key_head_dim=8, linear_value_head_dim=8, linear_allow_neg_eigval=False), 1),
}))
