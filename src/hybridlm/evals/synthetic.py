"""Synthetic tasks as arrays, for models small enough to train on them: what a mixer can express, measured.

    task = SYNTHETIC["s3"]
    batch = task.make(np.random.default_rng(0), 64, length=128)     # inputs, targets, mask: [64, 128]
    score = measure(model(batch.inputs).argmax(-1), batch, task.chance)

State tracking (`state_tracking.py`): parity, modular arithmetic, word problems of S3, A5 and S5, state-based recall.
Recall (`recall.py`): multi-query associative recall, induction, selective copying. Each has lengths to train on and
longer ones to test on: a model that has learnt the rule goes on being right, one that has memorised does not. Training
lengths are to be drawn from the whole list, so that no position is new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hybridlm.evals import recall, state_tracking
from hybridlm.evals.arrays import Batch

__all__ = ["SYNTHETIC", "Batch", "Score", "Synthetic", "measure"]


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A task: `make(rng, count, length)` gives a `Batch`, the same for the same generator state."""

    name: str
    about: str
    vocab: int  # token ids of inputs and targets lie below
    chance: float  # accuracy of the best guess that does not look at the input's order
    make: Callable[[np.random.Generator, int, int], Batch]
    train: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """`accuracy` over the counted positions; `scaled` = (accuracy - chance) / (1 - chance); `sequences`: share with
    every position right; `subsets`: accuracy where a subset's flag is set."""

    accuracy: float
    scaled: float
    sequences: float
    subsets: dict[str, float] = field(default_factory=dict)


def measure(predictions: np.ndarray, batch: Batch, chance: float) -> Score:
    """Of predictions [n, T], token ids."""
    right = (predictions == batch.targets) & batch.mask
    accuracy = float(right.sum() / batch.mask.sum())
    whole = ((predictions == batch.targets) | ~batch.mask).all(axis=1)
    subsets = {name: float(right[flag].sum() / batch.mask[flag].sum()) for name, flag in batch.subsets.items()
               if batch.mask[flag].any()}
    return Score(accuracy, (accuracy - chance) / (1 - chance), float(whole.mean()), subsets)


_SHORT = (8, 16, 24, 32, 40)
_TRAIN, _TEST = (16, 32, 64, 96, 128), (128, 256, 512)

SYNTHETIC = {t.name: t for t in (
    Synthetic("parity", "whether the ones so far are odd", 2, 1 / 2, state_tracking.parity, _SHORT, (40, 64, 128, 256)),
    Synthetic("modular_arithmetic", "the value so far of a sum of products, modulo 5", 8, 1 / 5,
              state_tracking.modular_arithmetic, _SHORT, (40, 64, 128, 256)),
    Synthetic("s3", "the product so far of permutations of 3", 6, 1 / 6,
              lambda rng, n, t: state_tracking.word_problem(rng, n, t, "S3"), _TRAIN, _TEST),
    Synthetic("a5", "the product so far of even permutations of 5", 60, 1 / 60,
              lambda rng, n, t: state_tracking.word_problem(rng, n, t, "A5"), _TRAIN, _TEST),
    Synthetic("s5", "the product so far of permutations of 5", 120, 1 / 120,
              lambda rng, n, t: state_tracking.word_problem(rng, n, t, "S5"), _TRAIN, _TEST),
    Synthetic("state_recall", "the bit where a pointer ends after swaps", state_tracking.RECALL_VOCAB, 1 / 2,
              state_tracking.state_based_recall, (45, 54, 63, 72, 81), (81, 99, 117, 153)),
    Synthetic("mqar", "the values of keys seen before", 8192, 1 / 4096, recall.mqar, (64, 128, 256), (128, 256, 512)),
    Synthetic("induction", "the token that followed this one before", 32, 1 / 31, recall.induction, _TRAIN,
              (128, 256, 512, 1024)),
    Synthetic("selective_copy", "16 tokens among noise, in order", 18, 1 / 16, recall.selective_copy,
              (64, 96, 128, 192, 256), (256, 512, 1024)),
)}
