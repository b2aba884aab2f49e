"""Recall: tasks whose answer is somewhere in what was read, and must be found by its neighbour.

Attention does them at any length; a recurrence of fixed size up to what its state can hold.
"""

from __future__ import annotations

import numpy as np

from hybridlm.evals.arrays import Batch

__all__ = ["induction", "mqar", "selective_copy"]


def mqar(rng: np.random.Generator, count: int, length: int, pairs: int | None = None, vocab: int = 8192,
         power: float = 0.01) -> Batch:
    """Multi-query associative recall (Arora et al., 2023): key value key value ..., then the keys again.

    Keys come from the lower half of the vocabulary (0 left out, which fills the rest), values from the upper one. Each
    key is asked for once, at a gap from its pair that follows a power law; the target at a key is its value.

    Args:
        pairs: of keys and values; None is a sixteenth of the length, as in 4 at 64 and 32 at 512.
        power: the law's exponent, 0.01 in the paper: near ones are a little more frequent.
    """
    pairs = pairs or max(1, length // 16)
    if 4 * pairs > length or pairs >= vocab // 2:
        raise ValueError(f"pairs: {pairs} do not fit in {length} tokens of a vocabulary of {vocab}")
    half, room = vocab // 2, (length - 2 * pairs) // 2  # places for a question, every second token
    weights = power * np.arange(1, room + 1) ** (power - 1)
    weights /= weights.sum()
    inputs, targets = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    mask = np.zeros(inputs.shape, bool)
    for i in range(count):
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.choice(vocab - half, pairs, replace=False)
        inputs[i, 0:2 * pairs:2], inputs[i, 1:2 * pairs:2] = keys, values
        places = 2 * pairs + 2 * rng.choice(room, pairs, replace=False, p=weights)
        inputs[i, places], targets[i, places], mask[i, places] = keys, values, True
    return Batch(inputs, targets, mask)


def induction(rng: np.random.Generator, count: int, length: int, vocab: int = 32) -> Batch:
    """Random tokens in which token 0 occurs once; it occurs again at the end, and the target is what followed it."""
    if length < 4:
        raise ValueError(f"length: {length} tokens are too few; give at least 4")
    inputs = rng.integers(1, vocab, (count, length), dtype=np.int32)
    at, rows = rng.integers(0, length - 2, count), np.arange(count)
    inputs[rows, at], inputs[:, -1] = 0, 0
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    targets[:, -1], mask[:, -1] = inputs[rows, at + 1], True
    return Batch(inputs, targets, mask)


def selective_copy(rng: np.random.Generator, count: int, length: int, tokens: int = 16, vocab: int = 18) -> Batch:
    """`tokens` tokens at random places among noise (token 0), then as many times "now" (token 1): write them in order.

    The others are 2 to vocab - 1.
    """
    if length < 2 * tokens:
        raise ValueError(f"length: {length} tokens are too few to write {tokens}; give at least {2 * tokens}")
    inputs, read = np.zeros((count, length), np.int32), length - tokens
    places = np.sort(rng.permuted(np.tile(np.arange(read), (count, 1)), axis=1)[:, :tokens], axis=1)
    chosen = rng.integers(2, vocab, (count, tokens), dtype=np.int32)
    np.put_along_axis(inputs, places, chosen, axis=1)
    inputs[:, read:] = 1
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    targets[:, read:], mask[:, read:] = chosen, True
    return Batch(inputs, targets, mask)
