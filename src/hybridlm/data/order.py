"""Which tokens step s trains on: a pure function of (seed, step), the same on any number of processes.

The stream of a split, thought of as a ring, is cut into windows of `sequence` tokens. Each epoch cuts at another offset
and visits the windows in another permutation. Samples are numbered through all epochs; step s is the samples
[s * batch, (s + 1) * batch). A process of rank r of w takes its w-th part of them. Nothing is kept between steps, so
resuming at a step is naming it.

The permutation is a Feistel network over the window numbers: a bijection that takes no memory and depends on integer
arithmetic alone, so that it is the same in ten years, with another numpy, for six trillion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridlm.data.repetition import repeats
from hybridlm.data.tokens import TokenStream
from hybridlm.errors import ConfigError

__all__ = ["Batch", "BatchOrder", "permute"]

_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Batch:
    """`inputs` and `targets` int64 [rows, sequence], targets one token on; `starts` bool, true at a document's eos.

    Targets of -1 are no part of the loss.
    """

    inputs: np.ndarray
    targets: np.ndarray
    starts: np.ndarray

    @property
    def counted(self) -> int:
        """Targets that are part of the loss."""
        return int((self.targets >= 0).sum())

    @property
    def documents(self) -> np.ndarray:
        """int32 [rows, sequence]: the number of the document within its row, from 0 or 1 on."""
        return np.cumsum(self.starts, axis=1, dtype=np.int32)

    @property
    def cu_seqlens(self) -> np.ndarray:
        """int32 [documents + 1]: where each document (or row) begins in the rows laid end to end, and the end."""
        cuts = self.starts.copy()
        cuts[:, 0] = True
        return np.append(np.flatnonzero(cuts.ravel()), cuts.size).astype(np.int32)


@dataclass(frozen=True)
class BatchOrder:
    """The global order of batches of one run."""

    stream: TokenStream
    sequence: int
    batch: int
    seed: int
    repetition: int = 0

    def __post_init__(self) -> None:
        if len(self.stream) < 2:
            raise ConfigError("data: fewer than two tokens to train on; give more text")

    @property
    def windows(self) -> int:
        """Windows an epoch."""
        return max(1, len(self.stream) // self.sequence)

    def window(self, sample: np.ndarray) -> np.ndarray:
        """First token of the windows of samples numbered through all epochs."""
        epoch, index = self.shuffled(sample)
        first = index * self.sequence
        for e in np.unique(epoch):
            first[epoch == e] += int(_mix(np.uint64(_key(self.seed, int(e), 0)))) % self.sequence
        return first % len(self.stream)

    def shuffled(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, number of the window within it) of samples numbered through all epochs."""
        epoch, index = np.divmod(np.asarray(sample, np.int64), self.windows)
        out = np.empty_like(index)
        for e in np.unique(epoch):
            mine = epoch == e
            out[mine] = permute(index[mine], self.windows, _key(self.seed, int(e), 1))
        return epoch, out

    def samples(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The numbers of the samples that one process takes at a step."""
        if self.batch % world:
            raise ConfigError(f"batch: {self.batch} sequences do not divide among {world} processes")
        part = self.batch // world
        return np.arange(part, dtype=np.int64) + (step * self.batch + rank * part)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """First tokens of the windows that one process takes at a step."""
        return self.window(self.samples(step, rank, world))

    def at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step."""
        rows, size = self.rows(step, rank, world), self.sequence
        tokens = np.stack([self.stream.read_round(int(r), size + 1) for r in rows])
        return self.without_repeats(
            Batch(tokens[:, :-1], tokens[:, 1:], np.stack([self._starts(int(r)) for r in rows])))

    def without_repeats(self, batch: Batch) -> Batch:
        """The batch with the rows that only repeat themselves taken out of the loss."""
        bad = [self.repetition > 1 and repeats(row, self.repetition) for row in batch.inputs]
        if not any(bad):
            return batch
        targets = np.where(np.array(bad)[:, None], -1, batch.targets)
        return Batch(batch.inputs, targets, batch.starts)

    def _starts(self, first: int) -> np.ndarray:
        """Where documents begin in the window."""
        starts, total = self.stream.starts, len(self.stream)
        flags = np.zeros(self.sequence, bool)
        at, filled = first, 0
        while filled < self.sequence:
            upto = min(total, at + self.sequence - filled)
            low, high = np.searchsorted(starts, (at, upto))
            flags[filled + (starts[low:high] - at)] = True
            filled += upto - at
            at = 0
        return flags


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each index.

    A Feistel network permutes the smallest range of 2^(2k) numbers that holds them; one that lands outside goes through
    again until it lands inside, which keeps it a bijection.
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [_mix(np.uint64((key + r * 0x9E3779B97F4A7C15) % 2**64)) for r in range(_ROUNDS)]
    out = np.asarray(index, np.uint64).copy()
    todo = np.ones(out.shape, bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo[todo] = out[todo] >= size
    return out.astype(np.int64)


def _key(seed: int, epoch: int, purpose: int) -> int:
    """One 64-bit key from three numbers."""
    key = seed % 2**64
    for part in (epoch, purpose):
        key = int(_mix(np.uint64(key))) ^ part
    return key


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's finaliser: every bit of the input stirs every bit of the output."""
    with np.errstate(over="ignore"):
        y: np.ndarray = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        y = (y ^ (y >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        y = (y ^ (y >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        y = y ^ (y >> np.uint64(31))
    return y
