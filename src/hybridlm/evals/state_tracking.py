"""State tracking: tasks whose answer depends on the order of everything read.

Transformers of fixed depth and linear recurrences with eigenvalues in [0, 1] cannot do them at every length (Merrill et
al., 2024; Grazzi et al., 2024); what a model does beyond its training lengths tells which it is.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np

from hybridlm.evals.arrays import Batch

__all__ = ["RECALL_VOCAB", "elements", "modular_arithmetic", "parity", "state_based_recall", "word_problem"]


def parity(rng: np.random.Generator, count: int, length: int) -> Batch:
    """Bits; at every position whether the ones so far are odd."""
    bits = rng.integers(0, 2, (count, length), dtype=np.int32)
    return Batch(bits, np.cumsum(bits, axis=1, dtype=np.int32) % 2, np.ones(bits.shape, bool))


def modular_arithmetic(rng: np.random.Generator, count: int, length: int, modulus: int = 5) -> Batch:
    """A number, an operator, a number, ...; after every number the value so far, products before sums, modulo 5.

    Tokens: 0 to modulus - 1 the numbers, then plus, minus, times. Targets are numbers.
    """
    inputs = np.zeros((count, length), np.int32)
    inputs[:, ::2] = rng.integers(0, modulus, inputs[:, ::2].shape)
    inputs[:, 1::2] = modulus + rng.integers(0, 3, inputs[:, 1::2].shape)
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    mask[:, ::2] = True
    total, product = np.zeros(count, np.int64), inputs[:, 0].astype(np.int64)  # value = total + product
    targets[:, 0] = product % modulus
    for t in range(2, length, 2):
        operator, number = inputs[:, t - 1] - modulus, inputs[:, t].astype(np.int64)
        times = operator == 2
        total = np.where(times, total, total + product) % modulus
        product = np.where(times, product * number, np.where(operator == 1, -number, number)) % modulus
        targets[:, t] = (total + product) % modulus
    return Batch(inputs, targets, mask)


@cache
def elements(group: str) -> np.ndarray:
    """Permutations of a group, int [order, degree], in lexicographic order: S3, S5, or A5 (the even ones)."""
    degree = int(group[1])
    found = np.array(list(permutations(range(degree))))
    if group[0] == "A":
        inversions = sum((found[:, i] > found[:, j]).astype(int) for i in range(degree) for j in range(i + 1, degree))
        found = found[inversions % 2 == 0]
    return found


@cache
def _products(group: str) -> np.ndarray:
    """[a, b] -> the number of a after b, that is x -> a(b(x))."""
    found = elements(group)
    number = {tuple(e): i for i, e in enumerate(found.tolist())}
    return np.array([[number[tuple(a[b].tolist())] for b in found] for a in found], np.int32)


def word_problem(rng: np.random.Generator, count: int, length: int, group: str) -> Batch:
    """Elements g1, g2, ...; at every position the number of the product gt after ... after g1."""
    table = _products(group)
    inputs = rng.integers(0, len(table), (count, length), dtype=np.int32)
    targets = np.empty_like(inputs)
    state = targets[:, 0] = inputs[:, 0]
    for t in range(1, length):
        state = targets[:, t] = table[inputs[:, t], state]
    return Batch(inputs, targets, np.ones(inputs.shape, bool))


_POINTERS, _MOST_BITS = 5, 64
_POINTER, _ADDRESS = 2, 2 + _POINTERS  # first token of each kind; 0 and 1 are the bits
_SWAP, _QUERY = _ADDRESS + _MOST_BITS, _ADDRESS + _MOST_BITS + 1
RECALL_VOCAB = _QUERY + 1


def state_based_recall(rng: np.random.Generator, count: int, length: int) -> Batch:
    """A bit array, five pointers into it, swaps of pointers; the bit where pointer a points in the end.

    bit x n, (pointer address) x 5, (swap pointer pointer) x m, query a: n + 10 + 3 m + 2 tokens, of which n is the
    largest number up to 64 that leaves about as many tokens to the swaps. `moved`: the samples in which a's address is
    not where it began; reading that is right in the others, so only `moved` shows tracking.
    """
    if length < 21:
        raise ValueError(f"length: {length} tokens are too few; give at least 21")
    bits = min(_MOST_BITS, max(_POINTERS, (length - 12) // 2))
    bits += (length - 12 - bits) % 3  # the swaps take the rest, three tokens each
    if bits > _MOST_BITS:
        bits -= 3
    swaps = (length - 12 - bits) // 3
    inputs = np.empty((count, length), np.int32)
    inputs[:, :bits] = rng.integers(0, 2, (count, bits))
    addresses = rng.permuted(np.tile(np.arange(bits), (count, 1)), axis=1)[:, :_POINTERS]
    inputs[:, bits:bits + 10:2] = _POINTER + np.arange(_POINTERS)
    inputs[:, bits + 1:bits + 10:2] = _ADDRESS + addresses
    start, rows = addresses[:, 0].copy(), np.arange(count)
    for i in range(swaps):
        first = rng.integers(0, _POINTERS, count)
        second = (first + rng.integers(1, _POINTERS, count)) % _POINTERS
        at = bits + 10 + 3 * i
        inputs[:, at], inputs[:, at + 1], inputs[:, at + 2] = _SWAP, _POINTER + first, _POINTER + second
        kept = addresses[rows, first].copy()
        addresses[rows, first], addresses[rows, second] = addresses[rows, second], kept
    inputs[:, -2], inputs[:, -1] = _QUERY, _POINTER
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    targets[:, -1], mask[:, -1] = inputs[rows, addresses[:, 0]], True
    return Batch(inputs, targets, mask, {"moved": addresses[:, 0] != start})
