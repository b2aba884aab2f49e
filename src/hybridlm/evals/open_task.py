"""A task's name, as typed, to a `Plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridlm.evals import tasks
from hybridlm.evals.cases import blocks_of, load
from hybridlm.evals.run import Plan, score_choices
from hybridlm.text import Tokenizer

__all__ = ["plan"]


def plan(name: str, data: Path | None, tokenizer: Tokenizer, context: int, *, shots: int | None = None,
         limit: int | None = None, truncate: bool = False, run_code: bool = False) -> Plan:
    """The plan of a benchmark (for RULER see `ruler.plan`).

    Args:
        data: folder with the items; None is the hub.
        context: the most tokens that an item may have.
        shots: worked examples; None is the task's own number.
        limit: only the first so many items, of MMLU of each subject.
        truncate: cut items that are too long from the left instead of refusing them.
        run_code: let programs that the model writes run, where the task is to write programs.
    """
    task = tasks.parse(name, shots)
    items, examples = load(task, data)
    if limit:
        seen: dict[str, int] = {}
        kept = []
        for item in items:
            key = item.subject if task.name == "mmlu" else ""
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= limit:
                kept.append(item)
        items = kept
    settings: dict[str, Any] = {"form": task.form, "shots": task.shots, "truncate": truncate}
    if task.form == "generate":
        from hybridlm.evals import generation

        return generation.plan(task, items, examples, tokenizer, context, settings, run_code)
    blocks = blocks_of(task, items, examples, tokenizer, context, truncate)
    return Plan(task.label, blocks, score_choices, task.figures, settings)
