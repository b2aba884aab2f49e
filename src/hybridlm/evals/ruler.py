"""RULER (Hsieh et al., 2024): 13 tasks that say how much of a long context a model uses.

Prompts are worded as in NVIDIA's RULER (Apache-2.0), built as large as a length in tokens allows, the answer's room
included, and scored by its rule: the share of the reference strings that occur in what the model wrote, case ignored;
for the two question answering tasks whether any occurs. The words and the long haystack are our own (`haystack.py`), so
results are labelled "own haystack". qa_1 reads `squad_val1000` from the data folder, qa_2 HotpotQA's own
`hotpot_dev_distractor_v1.json`, which only the user can fetch.

A sample depends on task, length, seed, number and tokenizer alone, so that any of them can be made again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.errors import ConfigError, DataError
from hybridlm.evals import ruler_tasks
from hybridlm.evals.cases import Block
from hybridlm.evals.generation import Prompt, score_prompts
from hybridlm.evals.haystack import made_sentences
from hybridlm.evals.items import find, read_items
from hybridlm.evals.ruler_tasks import Corpus, Question, Sample
from hybridlm.evals.run import Plan, Result
from hybridlm.text import Tokenizer

__all__ = ["TASKS", "available", "check", "fitted", "means", "plans", "score_all", "score_any"]

TASKS = {f"ruler_{name}": task.about for name, task in ruler_tasks.TASKS.items()}
_LEAST = 512
_HOTPOT = "hotpot_dev_distractor_v1.json"


def score_all(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the text, case ignored."""
    return sum(a.lower() in text.lower() for a in answers) / len(answers)


def score_any(text: str, answers: Sequence[str]) -> float:
    """1 if any of the answers occurs in the text, case ignored."""
    return float(any(a.lower() in text.lower() for a in answers))


def check(name: str, data: str | None, lengths: Sequence[int]) -> None:
    """Raise `ConfigError` for what cannot be run, before anything is opened."""
    if name not in TASKS:
        raise ConfigError(f"task: {name!r} is unknown; there are {', '.join(TASKS)}")
    if min(lengths) < _LEAST:
        raise ConfigError(f"lengths: {min(lengths)} tokens are too few for a task; give {_LEAST} or more")
    if "_qa_" in name and data in (None, "hub"):
        file = "squad_val1000.jsonl" if name.endswith("1") else _HOTPOT
        raise ConfigError(f"data: {name} reads {file} from a folder; give --data DIR, or name the other ruler tasks")


def available(data: str | None) -> tuple[list[str], list[str]]:
    """The tasks that can run, and those for which files are missing."""
    folder = None if data in (None, "hub") else Path(data or "")
    missing = []
    if folder is None or find(folder, "squad_val1000") is None:
        missing.append("ruler_qa_1")
    if folder is None or not (folder / _HOTPOT).is_file():
        missing.append("ruler_qa_2")
    return [name for name in TASKS if name not in missing], missing


def plans(name: str, tokenizer: Tokenizer, *, lengths: Sequence[int], samples: int, seed: int = 0,
          haystack: Path | None = None, data: Path | None = None) -> list[Plan]:
    """A plan for each length."""
    task = ruler_tasks.TASKS[name.removeprefix("ruler_")]
    corpus = _corpus(haystack, _questions(name, data) if "_qa_" in name else ())
    return [_plan(name, task, tokenizer, corpus, length, samples, seed) for length in lengths]


def means(results: Sequence[Result]) -> dict[int, tuple[float, float, int]]:
    """Of lengths at which several tasks ran: mean of their scores, its standard error, how many they are."""
    by_length: dict[int, list[dict[str, float | None]]] = {}
    for result in results:
        name, _, length = result.task.partition("@")
        if name in TASKS:
            by_length.setdefault(int(length), []).append(result.figures["score"])
    return {length: (sum(f["value"] or 0.0 for f in figures) / len(figures),
                     math.sqrt(sum((f["stderr"] or 0.0)**2 for f in figures)) / len(figures), len(figures))
            for length, figures in sorted(by_length.items()) if len(figures) > 1}


def _plan(name: str, task: ruler_tasks.Task, tokenizer: Tokenizer, corpus: Corpus, length: int, samples: int,
          seed: int) -> Plan:
    settings = {"length": length, "seed": seed, "haystack": "own haystack: " + corpus.name,
                "tokenizer": tokenizer.fingerprint[:16], "max_tokens": task.max_tokens}
    identity = hashlib.sha256(repr((name, sorted(settings.items()))).encode()).hexdigest()[:24]

    @lru_cache(maxsize=1)
    def units() -> int:
        return largest(lambda n: _tokens(tokenizer, task, corpus, n, seed, 0, length) <= length - task.max_tokens,
                       task.least)

    def prompt(number: int) -> Prompt:
        sample, tokens = fitted(task, corpus, tokenizer, units(), length, seed, number)

        def grade(text: str) -> dict[str, Any]:
            return {"score": (score_any if task.any else score_all)(_clean(text), sample.answers)}

        return Prompt(str(number), f"{identity}{number:08x}", "", tokens, task.max_tokens, (), grade)

    size = 1 if length >= 16384 else 4
    blocks = [Block([(str(i), f"{identity}{i:08x}") for i in range(at, min(samples, at + size))],
                    lambda at=at: [prompt(i) for i in range(at, min(samples, at + size))])  # type: ignore[misc]
              for at in range(0, samples, size)]
    return Plan(f"{name}@{length}", blocks, score_prompts, settings=settings)


def fitted(task: ruler_tasks.Task, corpus: Corpus, tokenizer: Tokenizer, units: int, length: int, seed: int,
           number: int) -> tuple[Sample, list[int]]:
    """A sample of about `units` that fits, and its prompt's tokens. Raises `ConfigError` where none does."""
    while True:
        sample = _sample(task, corpus, units, length, seed, number)
        tokens = tokenizer.encode(sample.prompt, special=False)
        if len(tokens) + task.max_tokens <= length:
            return sample, tokens
        if units <= task.least:
            raise ConfigError(f"lengths: {length} tokens are too few for this task, whose smallest sample has "
                              f"{len(tokens)} and needs {task.max_tokens} for the answer")
        units = max(task.least, units - max(1, units // 50))


def largest(fits: Callable[[int], bool], least: int) -> int:
    """The largest number that fits, `least` where none does, by doubling and halving."""
    low, high = least, least * 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _tokens(tokenizer: Tokenizer, task: ruler_tasks.Task, corpus: Corpus, units: int, seed: int, number: int,
            length: int) -> int:
    try:
        return len(tokenizer.encode(_sample(task, corpus, units, length, seed, number).prompt, special=False))
    except IndexError:  # no more documents than there are
        return length + 1


def _sample(task: ruler_tasks.Task, corpus: Corpus, units: int, length: int, seed: int, number: int) -> Sample:
    return task.make(np.random.default_rng([seed, length, number]), units, corpus)


def _clean(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", text).strip()


@lru_cache(maxsize=2)
def _corpus(haystack: Path | None, questions: tuple[Question, ...]) -> Corpus:
    documents = tuple(dict.fromkeys(d for q in questions for d in q.documents))
    if haystack is None:
        return Corpus("made sentences", tuple(made_sentences(np.random.default_rng(1), 20_000)), questions, documents)
    try:
        text = haystack.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{haystack}: cannot be read ({error.strerror}); give a file of text") from None
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]
    if len(sentences) < 100:
        raise DataError(f"{haystack}: has {len(sentences)} sentences; give a text of a book's length")
    return Corpus(f"sha256 {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}", tuple(sentences),
                  questions, documents)


def _questions(name: str, data: Path | None) -> tuple[Question, ...]:
    assert data is not None
    if name.endswith("1"):
        file = find(data, "squad_val1000")
        if file is None:
            raise DataError(f"{data}: has no squad_val1000.jsonl, .jsonl.gz or .parquet, which {name} needs")
        return tuple(Question(i.question, tuple(i.extra.get("answers") or [i.target]), (i.context,))
                     for i in read_items(file, choices=False))
    file = data / _HOTPOT
    if not file.is_file():
        raise DataError(f"{data}: has no {_HOTPOT}, which {name} needs; fetch it from HotpotQA's site")
    return _hotpot(file)


def _hotpot(file: Path) -> tuple[Question, ...]:
    import json

    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return tuple(Question(r["question"], (r["answer"],),
                              tuple(f"{title}\n{''.join(s)}" for title, s in r["context"])) for r in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not HotpotQA's distractor file ({error!r}); fetch it again") from None
