"""How the samples of the 13 RULER tasks are made: of a size in units (sentences, needles, words, documents)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hybridlm.evals.haystack import ADJECTIVES, NOUNS, words

__all__ = ["TASKS", "Corpus", "Question", "Sample", "Task"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = np.linspace(0, 1, 40)
_ZETA2 = np.pi**2 / 6


@dataclass(frozen=True, slots=True)
class Question:
    """Of a question answering set: its documents hold one of the answers."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """What samples are made from."""

    name: str
    sentences: tuple[str, ...]
    questions: tuple[Question, ...] = ()
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, up to where the model goes on, and the strings it should write."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """`make(rng, units, corpus)`; `max_tokens` for the answer; `any`: one answer of several is enough."""

    about: str
    make: Callable[[np.random.Generator, int, Corpus], Sample]
    max_tokens: int
    least: int = 1
    any: bool = False


def _value(rng: np.random.Generator, kind: str) -> str:
    if kind == "numbers":
        return str(rng.integers(1_000_000, 10_000_000))
    if kind == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def _different(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_value(rng, kind)] = None
    return list(found)


def _needle(key: str, value: str, kind: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _niah(haystack: str, *, key: str = "words", value: str = "numbers", keys: int = 1, values: int = 1,
          queries: int = 1) -> Callable[[np.random.Generator, int, Corpus], Sample]:
    """Needles in a haystack: `keys` keys of `values` values each, of which `queries` keys are asked for."""
    def make(rng: np.random.Generator, units: int, corpus: Corpus) -> Sample:
        hidden = _different(rng, key, keys + (units if haystack == "needles" else 0))
        mine = {k: _different(rng, value, values) for k in hidden[:keys]}
        needles = [_needle(k, v, value) for k, vs in mine.items() for v in vs]
        if haystack == "needles":
            hay, joint = [_needle(k, _value(rng, value), value) for k in hidden[keys:]], "\n"
        elif haystack == "noise":
            hay, joint = [NOISE] * units, "\n"
        else:
            at = int(rng.integers(len(corpus.sentences)))
            hay, joint = [corpus.sentences[(at + i) % len(corpus.sentences)] for i in range(units)], " "
        for needle in (needles[i] for i in rng.permutation(len(needles))):
            hay.insert(round(float(rng.choice(_DEPTHS)) * len(hay)), needle)
        asked = [hidden[i] for i in sorted(rng.permutation(keys)[:queries])]
        query = asked[0] if queries == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = values * queries == 1
        kind = value[:-1] if one else value
        prompt = (f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within the following "
                  f"text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{joint.join(hay)}\n"
                  f"What {'is' if one else 'are all'} the special magic {kind} for {query} mentioned in the provided "
                  f"text? The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}")
        return Sample(prompt, tuple(v for k in asked for v in mine[k]))

    return make


def _chain(rng: np.random.Generator, units: int, hops: int) -> tuple[str, str, list[str]]:
    """Text, value and variables of a chain of assignments among noise."""
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names["".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 5))] = None
    variables, value = list(names), str(rng.integers(10_000, 100_000))
    lines = [f"VAR {variables[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a}" for a, b in pairwise(variables)]
    hay = [NOISE] * units
    for offset, (at, line) in enumerate(zip(sorted(rng.integers(0, units + 1, len(lines))), lines, strict=True)):
        hay.insert(int(at) + offset, line)  # in order: a variable is assigned before it is used
    return "\n".join(hay), value, variables


def _tracking(rng: np.random.Generator, units: int, corpus: Corpus) -> Sample:
    """One chain of 4 hops, after a worked example."""
    def ask(text: str, value: str, count: int) -> str:
        return ("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
                f"{text}\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
                f"According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
                f"the value {value}, they are: ")

    text, value, variables = _chain(rng, 5, 4)
    example = ask(text, value, len(variables)) + " ".join(variables) + "\n\n"
    text, value, variables = _chain(rng, units, 4)
    return Sample(example + ask(text, value, len(variables)).rstrip(), tuple(variables))


def _common_words(rng: np.random.Generator, units: int, corpus: Corpus) -> Sample:
    """10 words that come often among `units` that come seldom, after a worked example."""
    def ask(common: int, rare: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = words(rng, common + rare)
        listed = [w for w in drawn[:common] for _ in range(often)] + [w for w in drawn[common:] for _ in range(seldom)]
        text = " ".join(f"{i}. {listed[j]}" for i, j in enumerate(rng.permutation(len(listed)), 1))
        return ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
                f"ones that appear most often.\n{text}\nQuestion: What are the 10 most common words in the above list? "
                "Answer: The top 10 words that appear most often in the list are:"), drawn[:common]

    example, answer = ask(10, 20, 3, 1)
    often, seldom = (30, 3) if units >= 60 else (6, 1)
    prompt, common = ask(10, units, often, seldom)
    listed = " ".join(f"{i}. {w}" for i, w in enumerate(answer, 1))
    return Sample(f"{example} {listed}\n\n{prompt}", tuple(common))


def _frequent_words(rng: np.random.Generator, units: int, corpus: Corpus) -> Sample:
    """Coded words whose counts fall with the square of their rank; the first rank is dots, to be ignored."""
    coded: dict[str, None] = {}
    ranks = 1 + int(np.sqrt(units / _ZETA2))  # those that occur at all
    while len(coded) < ranks:
        coded["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 6))] = None
    vocabulary = ["....", *coded]
    text = [w for r, w in enumerate(vocabulary, 1) for _ in range(int(units / _ZETA2 / r**2))]
    text = [text[i] for i in rng.permutation(len(text))]
    prompt = ("Read the following coded text and track the frequency of each coded word. Find the three most "
              f"frequently appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please "
              "ignore the dots '....'. What are the three most frequently appeared words in the above coded text? "
              "Answer: According to the coded text above, the three most frequently appeared words are:")
    return Sample(prompt, tuple(vocabulary[1:4]))


def _answering(rng: np.random.Generator, units: int, corpus: Corpus) -> Sample:
    """A question whose documents stand among `units` others."""
    q = corpus.questions[int(rng.integers(len(corpus.questions)))]
    own = set(q.documents)
    others = [corpus.documents[i] for i in rng.permutation(len(corpus.documents)) if corpus.documents[i] not in own]
    if units > len(others):
        raise IndexError(units)
    shown = [*q.documents, *others[:units]]
    text = "\n\n".join(f"Document {n}:\n{shown[i]}" for n, i in enumerate(rng.permutation(len(shown)), 1))
    order = ("Answer the question based on the given documents. Only give me the answer and do not output any other "
             "words.")
    return Sample(f"{order}\n\nThe following are given documents.\n\n{text}\n\n{order}\n\nQuestion: {q.question} "
                  "Answer:", q.answers)


TASKS: dict[str, Task] = {
    "niah_single_1": Task("a number in repeated noise", _niah("noise"), 128),
    "niah_single_2": Task("a number in prose", _niah("prose"), 128),
    "niah_single_3": Task("a UUID in prose", _niah("prose", value="uuids"), 128),
    "niah_multikey_1": Task("one of 4 numbers in prose", _niah("prose", keys=4), 128),
    "niah_multikey_2": Task("one number among nothing but others", _niah("needles"), 128),
    "niah_multikey_3": Task("a UUID by a UUID, among nothing but others",
                            _niah("needles", key="uuids", value="uuids"), 128),
    "niah_multivalue": Task("4 numbers of one key in prose", _niah("prose", values=4), 128),
    "niah_multiquery": Task("the numbers of 4 keys in prose", _niah("prose", keys=4, queries=4), 128),
    "vt": Task("all variables on a chain of assignments", _tracking, 30),
    "cwe": Task("the 10 common words of a list", _common_words, 120, least=10),
    "fwe": Task("the 3 most frequent coded words", _frequent_words, 50, least=60),
    "qa_1": Task("SQuAD with distracting documents", _answering, 32, any=True),
    "qa_2": Task("HotpotQA with distracting documents, from your file", _answering, 32, any=True),
}
