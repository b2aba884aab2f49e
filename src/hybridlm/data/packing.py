"""Packing whole documents into sequences, for long context: few are cut, and none begins in the middle.

The plain order cuts the stream wherever a window ends; at 64k tokens that leaves most long documents in halves. Here a
document longer than a sequence fills sequences of its own and leaves a rest; rests and shorter documents, longest
first, each go where the least room that suffices is left. Rows with room are kept in buckets by that room, so a million
documents take seconds. What room remains is padding, and no part of the loss.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybridlm.data.order import Batch, BatchOrder
from hybridlm.data.tokens import TokenStream

__all__ = ["PackedOrder", "fit", "order_of"]


def order_of(stream: TokenStream, packing: str, sequence: int, batch: int, seed: int,
             repetition: int = 0) -> BatchOrder:
    """The order of a recipe's `packing`: "stream" or "whole"."""
    kind = PackedOrder if packing == "whole" else BatchOrder
    return kind(stream, sequence, batch, seed, repetition)


@dataclass(frozen=True)
class PackedOrder(BatchOrder):
    """`BatchOrder` whose windows are rows of `plan`; each epoch visits all rows in another permutation."""

    @cached_property
    def plan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row bounds [rows + 1] into pieces, first token [pieces], length [pieces])."""
        starts = self.stream.starts
        ends = np.append(starts[1:], len(self.stream))
        lengths = ends - starts
        whole = lengths // self.sequence
        first = np.repeat(starts, whole) + self.sequence * (
            np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole))
        rest = lengths - whole * self.sequence
        held = rest > 0
        firsts, sizes = (starts + whole * self.sequence)[held], rest[held]
        packed, rows = fit(sizes, self.sequence)
        row = np.concatenate([np.arange(len(first)), len(first) + packed])
        order = np.argsort(row, kind="stable")
        bounds = np.searchsorted(row[order], np.arange(len(first) + rows + 1))
        return (bounds, np.concatenate([first, firsts])[order],
                np.concatenate([np.full(len(first), self.sequence), sizes])[order])

    @property
    def windows(self) -> int:
        return len(self.plan[0]) - 1

    def at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step; padding is the end-of-text token, with targets of -1."""
        _, rows = self.shuffled(self.samples(step, rank, world))
        bounds, first, sizes = self.plan
        eos = int(self.stream.read(int(self.stream.starts[0]), int(self.stream.starts[0]) + 1)[0])
        inputs = np.full((len(rows), self.sequence), eos, np.int64)
        targets = np.full_like(inputs, -1)
        starts = np.zeros(inputs.shape, bool)
        for i, row in enumerate(rows.tolist()):
            at = 0
            for piece in range(bounds[row], bounds[row + 1]):
                size = int(sizes[piece])
                tokens = self.stream.read_round(int(first[piece]), size + 1)
                inputs[i, at:at + size], targets[i, at:at + size] = tokens[:-1], tokens[1:]
                starts[i, at] = True
                at += size
            if at < self.sequence:
                starts[i, at] = True
        return self.without_repeats(Batch(inputs, targets, starts))


def fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """Best fit, longest first: (row of each piece, number of rows); no row holds more than `room`."""
    row_of = np.empty(len(sizes), np.int64)
    open_rows: dict[int, list[int]] = defaultdict(list)  # by the room left
    lefts = 0  # bit n is set where a row has room for exactly n
    rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        enough = lefts >> size
        if enough:
            left = size + (enough & -enough).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                lefts &= ~(1 << left)
        else:
            row, left, rows = rows, room, rows + 1
        row_of[piece] = row
        if left > size:
            open_rows[left - size].append(row)
            lefts |= 1 << (left - size)
    return row_of, rows
