"""Tasks in which the model writes: GSM8K by exact match, HumanEval and MBPP by running what it wrote.

Programs are written to `outputs.jsonl` and not run, unless the user asks for it: then each runs in a process of its own
with limits on time, memory, processes and file size, in an empty folder. That keeps accidents small. It is no sandbox:
a program that means harm can do it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridlm.errors import ConfigError, DataError
from hybridlm.evals.cases import Block, encode_pairs, head_of
from hybridlm.evals.items import Item
from hybridlm.evals.prompts import gsm8k_question, mbpp_question
from hybridlm.evals.results import Record
from hybridlm.evals.run import Plan
from hybridlm.evals.scorer import Scorer
from hybridlm.evals.tasks import Task
from hybridlm.text import Tokenizer

__all__ = ["Prompt", "gsm8k_score", "passes", "plan", "score_prompts"]

_BLOCK = 16
_SECONDS, _MEMORY = 10, 1 << 30  # of one program

Grade = Callable[[str], dict[str, Any]]  # what a text earned: "score" 0 to 1, more under "score_..."; or "not_run"


@dataclass(slots=True)
class Prompt:
    """An item whose answer the model writes."""

    id: str
    hash: str
    label: str
    tokens: list[int]
    max_tokens: int
    stop: tuple[str, ...]
    grade: Grade


def score_prompts(scorer: Scorer, prompts: list[Prompt], prefix: int) -> tuple[list[Record], list[dict[str, Any]]]:
    """Greedy answers to prompts that share `max_tokens` and `stop`."""
    texts = scorer.generate_until([p.tokens for p in prompts], prompts[0].max_tokens, prompts[0].stop, prefix)
    records: list[Record] = [{"id": p.id, "hash": p.hash, "label": p.label, "tokens": len(p.tokens), **p.grade(text)}
                             for p, text in zip(prompts, texts, strict=True)]
    return records, [{"id": p.id, "output": text} for p, text in zip(prompts, texts, strict=True)]


def plan(task: Task, items: Sequence[Item], examples: dict[str, list[Item]], tokenizer: Tokenizer, context: int,
         settings: dict[str, Any], run_code: bool) -> Plan:
    """The plan of a task in the form "generate"."""
    ask, max_tokens, stop, grade = {"gsm8k": _gsm8k, "humaneval": _humaneval, "mbpp": _mbpp}[task.name](run_code)
    head = head_of(task, examples, "")
    if settings["truncate"]:
        raise ConfigError("truncate: a prompt to be continued is never cut; leave --truncate out")
    blocks = []
    for at in range(0, len(items), _BLOCK):
        part = list(items[at:at + _BLOCK])

        def make(part: list[Item] = part) -> list[Prompt]:
            ids = [context for context, _ in encode_pairs(tokenizer, [(ask(item), "\n") for item in part], head)]
            prompts = [Prompt(item.id, item.hash, item.subject, tokens, max_tokens, stop, grade(item))
                       for item, tokens in zip(part, ids, strict=True)]
            for p in prompts:
                if len(p.tokens) + max_tokens > context:
                    raise DataError(f"{task.label}: item {p.id} has {len(p.tokens):,} tokens and needs {max_tokens} "
                                    f"for the answer, the context has {context:,}; give a larger --context or "
                                    "fewer --shots")
            return prompts

        blocks.append(Block([(item.id, item.hash) for item in part], make))
    settings = {**settings, "max_tokens": max_tokens, "run_code": run_code}
    return Plan(task.label, blocks, score_prompts, settings=settings)


Spec = tuple[Callable[[Item], str], int, tuple[str, ...], Callable[[Item], Grade]]


def _gsm8k(run_code: bool) -> Spec:
    return gsm8k_question, 256, ("Question:", "</s>", "<|im_end|>"), lambda item: (
        lambda text: gsm8k_score(text, item.target))


def gsm8k_score(text: str, target: str) -> dict[str, Any]:
    """`score`: the number after #### is the target; `score_flexible`: the last number in the text is."""
    def same(number: str | None) -> float:
        return float(number is not None and number.replace(",", "").replace("$", "").rstrip(".") == target)

    strict = re.search(r"#### (-?[0-9.,]+)", text)
    numbers = re.findall(r"-?\$?[0-9][0-9.,]*", text)
    return {"score": same(strict[1] if strict else None), "score_flexible": same(numbers[-1] if numbers else None)}


def _humaneval(run_code: bool) -> Spec:
    def grade(item: Item) -> Grade:
        return _program(run_code, lambda text: f"{item.context.rstrip()}{text}\n{item.extra['test']}\n"
                                               f"check({item.extra['entry_point']})\n")

    return lambda item: item.context.rstrip(), 256, ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), grade


def _mbpp(run_code: bool) -> Spec:
    def grade(item: Item) -> Grade:
        return _program(run_code, lambda text: "\n".join([text, *item.extra["test_list"]]) + "\n")

    return lambda item: mbpp_question(item).rstrip(), 256, ('\n"""', "\nclass", "\nassert", "\n#", "\nif __name__",
                                                            "\nprint"), grade


def _program(run_code: bool, whole: Callable[[str], str]) -> Grade:
    def grade(text: str) -> dict[str, Any]:
        if not run_code:
            return {"not_run": True}
        return {"score": float(passes(whole(text)))}

    return grade


_LIMITED = """
import sys
try:
    import resource
    seconds, memory = {seconds}, {memory}
    for what, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory),
                       (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))
except ImportError:
    pass
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
print({word!r})
"""


def passes(program: str) -> bool:
    """Whether a program with its tests runs to its end, in a process with limits, in an empty folder."""
    import secrets

    word = secrets.token_hex(16)  # an early exit must not count
    code = _LIMITED.format(seconds=_SECONDS, memory=_MEMORY, word=word)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([sys.executable, "-I", "-c", code], input=program, capture_output=True, text=True,
                                  errors="replace", timeout=_SECONDS + 5, cwd=folder, env={"PATH": ""}, check=False)
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.rstrip().endswith(word)
