"""How each benchmark asks: the text before an answer, and the answers.

Cloze form gives the question and compares the texts of the answers; a small model can do it. Letter form lists the
answers with letters and compares the letters; it measures knowledge better once a model has learnt to answer so, and
is at chance before. The wording is that of lm-evaluation-harness where it has the task, so that figures compare; blanks
before an answer belong to the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hybridlm.evals.items import Item

__all__ = ["CLOZE", "LETTER", "Form", "gsm8k_question", "mbpp_question"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Form:
    """`ask(item)`: (context, continuation) of each choice, or of the one target."""

    ask: Callable[[Item], list[tuple[str, str]]]
    head: Callable[[str], str] = lambda subject: ""  # before the worked examples of a subject


def _each(context: str, item: Item) -> list[tuple[str, str]]:
    return [(context, f" {choice}") for choice in item.choices]


def _boolq(item: Item) -> list[tuple[str, str]]:
    return _each(f"{item.context}\nQuestion: {item.question.rstrip('?')}?\nAnswer:", item)


def _gap(item: Item) -> list[tuple[str, str]]:
    """WinoGrande: each choice in the gap, and the rest of the sentence after it (Trinh and Le's partial scoring)."""
    before, _, after = item.question.partition("_")
    return [(before + choice, f" {after.strip()}") for choice in item.choices]


def _letters(item: Item) -> list[tuple[str, str]]:
    """MMLU's own form, for any multiple choice."""
    lines = [line for line in (item.context.strip(), item.question.strip()) if line]
    listed = "".join(f"{LETTERS[i]}. {choice}\n" for i, choice in enumerate(item.choices))
    return [("\n".join(lines) + f"\n{listed}Answer:", f" {LETTERS[i]}") for i in range(len(item.choices))]


def _mmlu_head(subject: str) -> str:
    """The line before MMLU's worked examples."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def _gsm8k(item: Item) -> list[tuple[str, str]]:
    """The worked solution without its calculator marks, and the number after ####."""
    solution = re.sub(r"<<[^>]*>>", "", str(item.extra.get("solution", ""))).strip()
    if "####" not in solution:
        solution = f"{solution}\n#### {item.target}".strip()
    return [(gsm8k_question(item), f" {solution}")]


def gsm8k_question(item: Item) -> str:
    return f"Question: {item.question}\nAnswer:"


def mbpp_question(item: Item) -> str:
    tests = "\n".join(item.extra.get("test_list") or ())
    return f'"""\n{item.question}\n{tests}\n"""\n'


# By the name that `tasks.py` uses.
CLOZE: dict[str, Form] = {
    "question": Form(lambda item: _each(f"Question: {item.question}\nAnswer:", item)),
    "plain": Form(lambda item: _each(item.question, item)),
    "ending": Form(lambda item: _each(item.context, item)),
    "boolq": Form(_boolq),
    "gap": Form(_gap),
    "social": Form(lambda item: _each(f"Q: {item.context} {item.question}\nA:", item)),
    "mmlu": Form(lambda item: _each(f"Question: {item.question.strip()}\nAnswer:", item)),
    "word": Form(lambda item: [(item.context, f" {item.target}")]),
    "gsm8k": Form(_gsm8k),
    "code": Form(lambda item: [(item.context, item.target)]),
    "mbpp": Form(lambda item: [(mbpp_question(item), item.target)]),
    "squad": Form(lambda item: [(f"{item.context}\nQuestion: {item.question}\nAnswer:", f" {item.target}")]),
}
LETTER = Form(_letters, _mmlu_head)
