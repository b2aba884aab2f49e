"""Records of single items, and the figures over them, each with its standard error.

A record never holds text of an item: its id, a hash, log-probabilities and lengths are enough to recompute every
figure. Standard errors are those of a mean over independently drawn items; of bits per byte, of a ratio of two sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridlm.evals.cases import Case

__all__ = ["choice_record", "mean", "ratio", "summary"]

Record = dict[str, Any]
Figure = dict[str, float | None]


def choice_record(case: Case, found: Sequence[tuple[float, bool]]) -> Record:
    """What scoring the choices (or the one target) of an item gave; log-probabilities in nats."""
    logprobs = [p for p, _ in found]
    record: Record = {"id": case.id, "hash": case.hash, "label": case.label, "logprobs": logprobs, "bytes": case.bytes,
                      "tokens": [len(continuation) for _, continuation in case.requests],
                      "greedy": [g for _, g in found]}
    if len(found) > 1:
        per_byte = [p / max(1, n) for p, n in zip(logprobs, case.bytes, strict=True)]
        record |= {"answer": case.answer, "correct": int(np.argmax(logprobs)) == case.answer,
                   "correct_bytes": int(np.argmax(per_byte)) == case.answer}
    else:
        record |= {"answer": 0, "correct": found[0][1]}
    if case.truncated:
        record["truncated"] = True
    return record


def summary(records: Sequence[Record]) -> dict[str, Figure]:
    """Figures over records of one kind.

    acc: share right by log-probability (of a lone target: share that greedy decoding writes). acc_bytes: by
    log-probability a byte. bits_per_byte: of the right answer. perplexity: of a lone target, a target (not a token).
    score: mean of what a generation earned, 0 to 1; programs that were not run have no figure.
    """
    if "not_run" in records[0]:
        return {}
    if "score" in records[0]:
        names = [k for k in records[0] if k == "score" or k.startswith("score_")]
        return {name: mean([float(r[name]) for r in records]) for name in names}
    figures = {"acc": mean([float(r["correct"]) for r in records])}
    gold = [r["logprobs"][r["answer"]] for r in records]
    if "correct_bytes" in records[0]:
        figures["acc_bytes"] = mean([float(r["correct_bytes"]) for r in records])
    else:
        nats = mean([-p for p in gold])
        perplexity = math.exp(min(700.0, nats["value"] or 0.0))
        error = nats["stderr"]
        figures["perplexity"] = {"value": perplexity, "stderr": None if error is None else perplexity * error}
    figures["bits_per_byte"] = ratio([-p / math.log(2) for p in gold], [r["bytes"][r["answer"]] for r in records])
    return figures


def mean(values: Sequence[float]) -> Figure:
    """Mean and its standard error, s / sqrt(n)."""
    x = np.asarray(values, np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return {"value": float(x.mean()), "stderr": error}


def ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """Ratio of sums and its standard error by the linearised (delta) method."""
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    value = float(a.sum() / b.sum())
    n = len(a)
    error = math.sqrt(float(((a - value * b) ** 2).sum()) * n / (n - 1)) / float(b.sum()) if n > 1 else None
    return {"value": value, "stderr": error}
