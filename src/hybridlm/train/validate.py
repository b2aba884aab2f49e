"""Bits per byte of held-out documents while training: fast, in windows as long as a training sequence.

Each document is cut into windows that do not overlap; a window does not see the one before it, so the figure is a
little above what `hybridlm eval bpb` finds, which carries the state through whole documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridlm.data import TokenStream
from hybridlm.train.loss import token_losses

__all__ = ["Bits", "validate"]


@dataclass(slots=True)
class Bits:
    """Information and text it is spread over."""

    bits: float = 0.0
    nbytes: int = 0

    @property
    def per_byte(self) -> float:
        return self.bits / self.nbytes if self.nbytes else math.nan


def validate(hidden: Callable[[Tensor], Tensor], weight: Callable[[], Tensor], stream: TokenStream, *,
             sequence: int, rows: int, limit: int = 0, rank: int = 0, world: int = 1,
             together: Callable[[Tensor], Tensor] = lambda t: t, mine: Callable[[Tensor], Tensor] = lambda t: t,
             multiple: int = 1) -> dict[str, Bits]:
    """Bits and bytes by label, and under "all" together.

    Args:
        hidden: token ids [b, t] -> hidden states [b, t, D], or those of `mine` of the tokens.
        weight: the output head [V, D] as it is after `hidden`.
        rank, world: this process takes every `world`-th batch; all run the model equally often.
        together: the sum of a tensor over all processes.
        mine, multiple: this process's part of a row of tokens, whose length must be a multiple.
        limit: at most about so many tokens, of documents spread evenly over the stream; 0 means all.
    """
    every = max(1, math.ceil(len(stream) / limit)) if limit else 1
    labels = [""] if not stream.labels else list(stream.labels)
    by_label = {label: Bits() for label in labels}
    windows: list[tuple[np.ndarray, str]] = []
    for number, (tokens, size, label) in enumerate(stream.each()):
        if number % every:
            continue
        by_label[label].nbytes += size
        windows += [(tokens[at:at + sequence + 1], label) for at in range(0, len(tokens) - 1, sequence)]
    batches = list(_padded(windows, rows, multiple))
    nats_of = torch.zeros(len(labels), dtype=torch.float64)
    device = weight().device
    for at in range(0, len(batches), world):
        own = at + rank < len(batches)
        group, ids, lengths = batches[at + rank if own else at]
        states = hidden(torch.from_numpy(ids[:, :-1]).to(device))
        targets = mine(torch.from_numpy(ids[:, 1:]).to(device))
        losses = token_losses(states.reshape(-1, states.shape[-1]), weight(), targets.reshape(-1))
        counted = mine(torch.arange(ids.shape[1] - 1) < torch.tensor(lengths)[:, None])
        nats = (losses.view(targets.shape).double().cpu() * counted).sum(1).tolist()
        for row, (_, label) in enumerate(group if own else []):
            nats_of[labels.index(label)] += nats[row]
    for label, amount in zip(labels, together(nats_of.to(device)).tolist(), strict=True):
        by_label[label].bits = amount / math.log(2)
    total = Bits(sum(b.bits for b in by_label.values()), sum(b.nbytes for b in by_label.values()))
    return {"all": total, **{label: b for label, b in by_label.items() if label and b.nbytes}}


def _padded(windows: list[tuple[np.ndarray, str]], rows: int, multiple: int) \
        -> Iterator[tuple[list[tuple[np.ndarray, str]], np.ndarray, list[int]]]:
    """Windows of like length in batches, padded behind; a causal model's earlier outputs do not see the padding."""
    windows = sorted(windows, key=lambda w: -len(w[0]))
    for at in range(0, len(windows), rows):
        group = windows[at:at + rows]
        ids = np.zeros((len(group), -(-(len(group[0][0]) - 1) // multiple) * multiple + 1), np.int64)
        for row, (tokens, _) in enumerate(group):
            ids[row, :len(tokens)] = tokens
        yield group, ids, [len(tokens) - 1 for tokens, _ in group]
