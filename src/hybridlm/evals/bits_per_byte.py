"""Bits per byte: how well a model predicts text, comparable between models with different tokenizers.

Information content over all tokens of a document, divided by the bytes of its UTF-8. The end-of-text token stands in
front, so the first token counts too; the end of the document does not. A document longer than the model's context is
read in windows, each beginning half a context before the tokens it scores, so every token has at least half a context
of text before it and is counted once.

By position: the same sums by how many tokens of context a prediction had, in octaves. A model that uses its context
goes on improving from one to the next; one that reads beyond what it was made for turns worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hybridlm.data import Document, Source
from hybridlm.errors import ConfigError, DataError
from hybridlm.evals.scorer import Scorer
from hybridlm.text import Tokenizer

__all__ = ["BitsPerByte", "bits_per_byte", "documents_of"]

_LEAST_OCTAVE = 5  # up to 32 tokens of context are one
_BATCH = 8192  # tokens handed to the scorer at a time


@dataclass
class BitsPerByte:
    """The sums behind the figure, and the same for each label that documents carry and each octave of context."""

    bits: float = 0.0
    bytes: int = 0
    tokens: int = 0
    documents: int = 0
    labels: dict[str, BitsPerByte] = field(default_factory=dict)
    octaves: dict[int, BitsPerByte] = field(default_factory=dict)  # by the bit length of the tokens of context

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes if self.bytes else math.nan

    def by_position(self) -> list[tuple[int, int, BitsPerByte]]:
        """(first, last, sums) of predictions with `first` to `last` (exclusive) tokens of context."""
        return [(0 if k == _LEAST_OCTAVE else 1 << k >> 1, 1 << k, part) for k, part in sorted(self.octaves.items())]

    def add_positions(self, context: np.ndarray, bits: np.ndarray, sizes: np.ndarray) -> None:
        """Single predictions: tokens of context, bits and bytes of each."""
        octave = np.maximum(_LEAST_OCTAVE, np.frexp(context)[1])
        for k in np.unique(octave):
            mine, part = octave == k, self.octaves.setdefault(int(k), BitsPerByte())
            part.bits += float(bits[mine].sum(dtype=np.float64))
            part.bytes += int(sizes[mine].sum())
            part.tokens += int(mine.sum())

    def add(self, bits: float, size: int, tokens: int, label: str) -> None:
        for sums in (self, self.labels.setdefault(label, BitsPerByte())) if label else (self,):
            sums.bits += bits
            sums.bytes += size
            sums.tokens += tokens
            sums.documents += 1


def documents_of(paths: Iterable[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """The documents of files and folders of text, JSON lines and Parquet; a plain text file is one document."""
    for path in paths:
        for _, _, document in Source.open(path, text_field=text_field, whole=True).documents():
            yield document


def bits_per_byte(scorer: Scorer, tokenizer: Tokenizer, documents: Iterable[Document], *, context: int | None = None,
                  progress: Callable[[BitsPerByte], None] | None = None) -> BitsPerByte:
    """Score documents (of `documents_of`, or one's own) with a model.

    Args:
        context: window in tokens; None is the scorer's own.
        progress: called after each batch with the sums so far.

    Raises `DataError` when there is no text at all.
    """
    limit = scorer.context if context is None else context
    if limit < 2:
        raise ConfigError(f"context: {limit} tokens leave nothing to predict; give at least 2")
    if tokenizer.eos is None:
        raise DataError("the tokenizer names no end-of-text token, from which the first token is predicted")
    total, sizes = BitsPerByte(), _TokenSizes(tokenizer)
    for batch in _batches(documents, tokenizer, limit):
        scores = scorer.score([ids[a:b] for _, ids, spans in batch for a, b, _ in spans])
        at = 0
        for document, ids, spans in batch:
            nats = 0.0
            for (first, last, skip), logprobs in zip(spans, scores[at:at + len(spans)], strict=True):
                nats -= float(np.sum(logprobs[skip:], dtype=np.float64))
                total.add_positions(np.arange(1 + skip, last - first), logprobs[skip:] / -math.log(2),
                                    sizes[ids[first + 1 + skip:last]])
            at += len(spans)
            total.add(nats / math.log(2), _size(document.text), len(ids) - 1, document.label)
        if progress:
            progress(total)
    if not total.bytes:
        raise DataError("no text to evaluate on; give files that are not empty")
    return total


class _TokenSizes:
    """Bytes that each token stands for, found when first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._known = tokenizer, np.full(tokenizer.vocab_size, -1, np.int64)

    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        wanted = np.asarray(ids, np.int64)
        for token in np.unique(wanted[self._known[wanted] < 0]):
            self._known[token] = len(self._tokenizer.token_bytes(int(token)))
        return self._known[wanted]


Span = tuple[int, int, int]  # first token, end, and how many of its log-probabilities another window has counted


def spans_of(length: int, limit: int) -> list[Span]:
    """Windows of at most `limit` tokens over a text of `length`, each prediction counted in exactly one."""
    spans = [(0, min(length, limit), 0)]
    stride = max(1, limit // 2)
    while spans[-1][1] < length:
        end = min(length, spans[-1][1] + stride)
        start = max(0, end - limit)
        spans.append((start, end, spans[-1][1] - 1 - start))
    return spans


def _batches(documents: Iterable[Document], tokenizer: Tokenizer, limit: int) \
        -> Iterator[list[tuple[Document, Sequence[int], list[Span]]]]:
    batch: list[tuple[Document, Sequence[int], list[Span]]] = []
    held = 0
    for document in documents:
        ids = [tokenizer.eos or 0, *tokenizer.encode(document.text, special=False)]
        spans = spans_of(len(ids), limit)
        batch.append((document, ids, spans))
        held += sum(b - a for a, b, _ in spans)
        if held >= _BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
