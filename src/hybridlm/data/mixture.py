"""Several sources as one stream, mixed document by document in given shares of tokens.

An epoch of the mixture is as long as it takes to use every document of every source once; sources that must be larger
than they are come round again, whole as often as they fit and then a part of their documents, others each time the mix
is made from another seed. All documents of the epoch are shuffled, so every window of training draws on all sources.
What the mixture holds is a table of one row a document; tokens stay where they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hybridlm.data.order import permute
from hybridlm.data.tokens import LABEL, TokenStream
from hybridlm.errors import ConfigError, DataError

__all__ = ["Mixture", "join", "parse_mixture"]

LONGEST = 8  # an epoch is at most so many times the tokens of all sources; of what is given less weight, a part is used
_PART = re.compile(r"(.+):([0-9.]+(?:[eE][-+]?[0-9]+)?)")


def parse_mixture(data: str) -> list[tuple[str, float]]:
    """Paths and weights of "a:0.7,b:0.3"; the weight of a single path is 1. Weights are brought to a sum of 1."""
    if Path(data).exists():
        return [(data, 1.0)]
    parts = [_PART.fullmatch(part.strip()) for part in data.split(",")]
    if not all(parts):
        if any(parts) and len(parts) > 1:
            raise ConfigError(f"data: {data}: some sources have a weight and some have none; write a:0.7,b:0.3")
        return [(data, 1.0)]
    found = [(m[1], float(m[2])) for m in parts if m]
    total = sum(weight for _, weight in found)
    if not all(weight > 0 for _, weight in found):
        raise ConfigError(f"data: {data}: weights must be above 0")
    if len({path for path, _ in found}) < len(found):
        raise ConfigError(f"data: {data}: a source is named twice; add up its weights")
    return [(path, weight / total) for path, weight in found]


@dataclass(frozen=True)
class Mixture(TokenStream):
    """The mixture of `streams`; what training needs of a `TokenStream`, made of others.

    weights: shares of tokens, their sum 1; kept to within a document a source.
    """

    shards: tuple[np.ndarray, ...] = ()
    tables: tuple[np.ndarray, ...] = ()
    streams: tuple[TokenStream, ...] = ()
    weights: tuple[float, ...] = ()
    seed: int = 0

    def __init__(self, streams: tuple[TokenStream, ...], weights: tuple[float, ...], seed: int) -> None:
        for name, value in (("streams", streams), ("weights", weights), ("seed", seed), ("labels", ("",)),
                            ("shards", ()), ("tables", ())):
            object.__setattr__(self, name, value)
        if any(len(stream) < 1 for stream in streams):
            raise DataError("data: a source of the mixture has no text to train on; leave it out")

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, first token in it, first token here with the end behind) of each document."""
        sizes = [len(stream) for stream in self.streams]
        whole = min(max(n / w for n, w in zip(sizes, self.weights, strict=True)), LONGEST * sum(sizes))
        sources, firsts, lengths = [], [], []
        for number, (stream, weight) in enumerate(zip(self.streams, self.weights, strict=True)):
            starts = stream.starts
            counts = np.diff(np.append(starts, len(stream)))
            copies, rest = divmod(weight * whole, len(stream))
            some = permute(np.arange(len(starts)), len(starts), self.seed + 2 * number + 1)
            upto = int(np.searchsorted(np.cumsum(counts[some]), rest + 0.5))
            picked = np.concatenate([np.tile(np.arange(len(starts)), int(copies)), some[:upto]])
            sources.append(np.full(len(picked), number, np.int16))
            firsts.append(starts[picked])
            lengths.append(counts[picked])
        order = permute(np.arange(sum(map(len, sources))), sum(map(len, sources)), self.seed)
        ends = np.cumsum(np.concatenate(lengths)[order])
        return np.concatenate(sources)[order], np.concatenate(firsts)[order], np.concatenate([[0], ends])

    def __len__(self) -> int:
        return int(self._table[2][-1])

    @property
    def starts(self) -> np.ndarray:
        """First token of each document, ascending."""
        return self._table[2][:-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        sources, firsts, begins = self._table
        out = np.empty(stop - start, np.int64)
        at, row = start, int(np.searchsorted(begins, start, side="right")) - 1
        while at < stop:
            upto = min(stop, int(begins[row + 1]))
            first = int(firsts[row]) + at - int(begins[row])
            out[at - start:upto - start] = self.streams[sources[row]].read(first, first + upto - at)
            at, row = upto, row + 1
        return out


def join(streams: list[tuple[str, TokenStream]]) -> TokenStream:
    """Streams behind one another, their documents labelled with the names of the streams; for validation."""
    shards: list[np.ndarray] = []
    tables: list[np.ndarray] = []
    labels: list[str] = []
    for name, stream in streams:
        for table in stream.tables:
            moved = table.copy()
            moved[:, LABEL] += len(labels)
            tables.append(moved)
        shards += stream.shards
        labels += [f"{name}/{label}" if label else name for label in stream.labels]
    return TokenStream(tuple(shards), tuple(tables), tuple(labels))
