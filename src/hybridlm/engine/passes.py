"""Passes: new tokens of one or more sequences through the walk, and what comes out at the head.

What is long goes through in slabs of `SLAB` rows, and logits that are only looked at are made `HEAD_ROWS` rows at a
time, so memory beside the weights and the states does not grow with the length of a text. One pass runs at a time,
under a lock; threads take turns pass by pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hybridlm.engine.layout import PAGE
from hybridlm.engine.walk import Batch, Ops, forward, logits
from hybridlm.engine.weights import Weights
from hybridlm.errors import HybridLMError

__all__ = ["Part", "Passes"]

SLAB = 256  # rows of one pass: enough for the matmuls, small enough for memory and for an interruption
HEAD_ROWS = 32
SCORE_BYTES = 256 << 20  # of the states of texts scored side by side

Part = tuple[Any, np.ndarray]  # a state, and the tokens that it shall read, int32


class Passes:
    """The weights and operations of one engine."""

    def __init__(self, weights: Weights, ops: Ops, context: int) -> None:
        self.weights, self.ops, self.context = weights, ops, context
        self.lock = threading.RLock()

    def read(self, parts: Sequence[Part], trial: bool = False) -> np.ndarray:
        """Read tokens into states; float32 logits [len(parts), vocab] of what follows each."""
        with self.lock:
            self.feed(parts, trial)
            return self.next_logits([state for state, _ in parts])

    def feed(self, parts: Sequence[Part], trial: bool = False) -> None:
        """`read` without logits."""
        with self.lock:
            for _ in self._run(parts, trial):
                pass

    def read_every(self, parts: Sequence[Part], trial: bool = False) -> np.ndarray:
        """Float32 logits [all tokens, vocab] of what follows each token, part after part."""
        starts = np.cumsum([0] + [len(ids) for _, ids in parts])
        out = np.empty((int(starts[-1]), self.weights.config.vocab_size), np.float32)
        with self.lock:
            for slices, hidden in self._run(parts, trial):
                row = 0
                for p, a, b in slices:
                    for i in range(0, b - a, HEAD_ROWS):
                        j, to = min(i + HEAD_ROWS, b - a), starts[p] + a
                        out[to + i:to + j] = logits(self.weights, self.ops, hidden[row + i:row + j])
                    row += b - a
        return out

    def next_logits(self, states: Sequence[Any]) -> np.ndarray:
        """Float32 [len(states), vocab]: what follows the last token that each has read."""
        with self.lock:
            return np.asarray(logits(self.weights, self.ops, self.ops.stack([state.hidden for state in states])))

    def score(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each text, float32 [T - 1]: the log-probability of each token but the first."""
        result = [np.zeros(len(t) - 1, np.float32) for t in texts]
        order = [i for i in sorted(range(len(texts)), key=lambda i: len(texts[i])) if len(texts[i]) > 1]
        states: list[Any] = [self.ops.state()] if order else []
        while order:
            group = [order.pop()]  # a long text alone, short ones as many as one pass holds
            while (order and sum(len(texts[i]) for i in (*group, order[-1])) <= (self.ops.slab or SLAB)
                   and (len(group) + 1) * states[0].own_nbytes <= SCORE_BYTES):
                group.append(order.pop())
            for state in states:
                state.reset()
            states += [self.ops.state() for _ in range(len(group) - len(states))]
            parts = [(state, texts[i][:-1]) for state, i in zip(states, group, strict=False)]
            with self.lock:
                for slices, hidden in self._run(parts, False):
                    targets = np.concatenate([texts[group[p]][a + 1:b + 1] for p, a, b in slices])
                    found, row = self._logprobs(hidden, targets), 0
                    for p, a, b in slices:
                        result[group[p]][a:b] = found[row:row + b - a]
                        row += b - a
        return result

    def take_back(self, state: Any, count: int) -> None:
        """Make a state forget the last `count` tokens that it has read, in a trial and nothing since."""
        trial = state.trial
        if trial is None or trial.position < 0 or not 0 <= count <= state.position - trial.position:
            raise HybridLMError(f"take_back: the last step was no trial of {count} or more tokens")
        kept = state.position - trial.position - count
        with self.lock:
            if count:
                hidden, tokens, state.valid = trial.hidden, state.tokens[trial.position:trial.position + kept], False
                trial.go_back(state)
                if kept:
                    self.ops.replay(self.weights, state, trial.rows, kept)
                state.hidden[:] = hidden[kept]
                state.tokens += tokens
                state.valid = True
            trial.position = -1

    def _run(self, parts: Sequence[Part], trial: bool) -> Iterator[tuple[list[tuple[int, int, int]], Any]]:
        """Read tokens into states, at most SLAB rows a pass. The caller holds the lock.

        Yields after each pass what its rows were, as (part, first token, last token exclusive) in order, and the final
        hidden rows, which the next pass overwrites. The states are valid again when all is read.
        """
        for state, ids in parts:
            if state.position + len(ids) > self.context:
                raise HybridLMError(f"context: {state.position + len(ids)} tokens do not fit in {self.context}; open "
                                    "the model with a larger context or shorten the text")
        slab = self.ops.slab or SLAB
        if trial and sum(len(ids) for _, ids in parts) > slab:
            raise HybridLMError(f"trial: {sum(len(ids) for _, ids in parts)} tokens do not fit in one pass of {slab}")
        for state, _ in parts:
            state.valid = False
            if trial:
                state.trial = state.trial or state.new_trial()
        for slices in _slices([len(ids) for _, ids in parts], slab, [state.position for state, _ in parts],
                              PAGE if self.ops.slab else 1):
            batch = Batch.of([(parts[p][0], parts[p][1][a:b]) for p, a, b in slices], trial)
            hidden = forward(self.weights, self.ops, batch)
            for (p, a, b), segment in zip(slices, batch.segments, strict=True):
                state, ids = parts[p]
                if state.trial is not None:
                    state.trial.position = state.position if trial else -1
                    if trial:  # the row before the pass too, should all of it be taken back
                        rows = hidden[segment.first:segment.last]
                        state.trial.hidden = self.ops.stack([state.hidden, *rows])
                state.tokens += ids[a:b].tolist()
                state.hidden[:] = hidden[segment.last - 1]
            yield slices, hidden
        for state, _ in parts:
            state.valid = True

    def _logprobs(self, hidden: Any, targets: np.ndarray) -> np.ndarray:
        """Log-probability of a target after each row."""
        return np.concatenate([self.ops.logprobs(hidden[i:i + HEAD_ROWS], self.weights.head, targets[i:i + HEAD_ROWS])
                               for i in range(0, len(targets), HEAD_ROWS)])


def _slices(lengths: Sequence[int], rows: int, positions: Sequence[int], align: int
            ) -> Iterator[list[tuple[int, int, int]]]:
    """(part, first, last) triples that cover all parts in order, in groups of at most `rows` tokens.

    A part that does not fit is cut where its sequence reaches a multiple of `align`, if it does: where chunks of the
    delta rule end too, a cut changes no sum.
    """
    group: list[tuple[int, int, int]] = []
    room = rows
    for part, length in enumerate(lengths):
        first = 0
        while first < length:
            last = min(length, first + room)
            if last < length:
                cut = last - (positions[part] + last) % align
                last = cut if cut > first else first if group else last
            if last > first:
                group.append((part, first, last))
            room -= last - first
            first = last
            if first < length or not room:
                yield group
                group, room = [], rows
    if group:
        yield group
