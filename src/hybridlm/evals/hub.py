"""Benchmarks as data sets on the Hugging Face hub, brought into the form of `items.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hybridlm.errors import DataError
from hybridlm.evals.items import Item, _hub_rows, _item

__all__ = ["HUB", "read"]

Row = dict[str, Any]


def _listed(question: str) -> Callable[[Row], Row]:
    """Choices as {"text": [...], "label": [...]} and the answer as a label."""
    def convert(row: Row) -> Row:
        return {"id": row["id"], "question": row[question], "choices": row["choices"]["text"],
                "answer": row["choices"]["label"].index(row["answerKey"])}

    return convert


def _mmlu(row: Row) -> Row:
    return {"id": f"{row['subject']}/{row['id']}", **{k: row[k] for k in ("question", "choices", "answer", "subject")}}


def _hellaswag(row: Row) -> Row:
    import re

    def plain(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"id": row["id"], "context": plain(context), "choices": [plain(e) for e in row["endings"]],
            "answer": int(row["label"])}


def _gsm8k(row: Row) -> Row:
    solution, _, target = row["answer"].rpartition("####")
    return {"id": row["id"], "question": row["question"], "solution": solution.strip(),
            "target": target.strip().replace(",", "")}


def _lambada(row: Row) -> Row:
    context, _, target = row["text"].rpartition(" ")
    return {"id": row["id"], "context": context, "target": target}


# file name -> repository[/config], split, row -> item
HUB: dict[str, tuple[str, str, Callable[[Row], Row]]] = {
    "mmlu_test": ("cais/mmlu/all", "test", _mmlu),
    "mmlu_dev": ("cais/mmlu/all", "dev", _mmlu),
    "arc_easy_test": ("allenai/ai2_arc/ARC-Easy", "test", _listed("question")),
    "arc_easy_val": ("allenai/ai2_arc/ARC-Easy", "validation", _listed("question")),
    "arc_challenge_test": ("allenai/ai2_arc/ARC-Challenge", "test", _listed("question")),
    "arc_challenge_val": ("allenai/ai2_arc/ARC-Challenge", "validation", _listed("question")),
    "openbookqa_val": ("allenai/openbookqa/main", "validation", _listed("question_stem")),
    "csqa_val": ("tau/commonsense_qa", "validation", _listed("question")),
    "hellaswag_val": ("Rowan/hellaswag", "validation", _hellaswag),
    "piqa_val": ("ybisk/piqa", "validation", lambda r: {
        "id": r["id"], "question": r["goal"], "choices": [r["sol1"], r["sol2"]], "answer": r["label"]}),
    "winogrande_val": ("allenai/winogrande/winogrande_xl", "validation", lambda r: {
        "id": r["id"], "question": r["sentence"], "choices": [r["option1"], r["option2"]],
        "answer": int(r["answer"]) - 1}),
    "boolq_val": ("google/boolq", "validation", lambda r: {
        "id": r["id"], "context": r["passage"], "question": r["question"], "choices": ["no", "yes"],
        "answer": int(r["answer"])}),
    "socialiqa_val": ("lighteval/siqa", "validation", lambda r: {
        "id": r["id"], "context": r["context"], "question": r["question"],
        "choices": [r["answerA"], r["answerB"], r["answerC"]], "answer": int(r["label"]) - 1}),
    "lambada_openai_test": ("EleutherAI/lambada_openai/en", "test", _lambada),
    "gsm8k_test": ("openai/gsm8k/main", "test", _gsm8k),
    "gsm8k_train": ("openai/gsm8k/main", "train", _gsm8k),
    "humaneval_test": ("openai/openai_humaneval", "test", lambda r: {
        "id": r["task_id"], "context": r["prompt"], "target": r["canonical_solution"], "test": r["test"],
        "entry_point": r["entry_point"]}),
    "mbpp_test": ("google-research-datasets/mbpp/full", "test", lambda r: {
        "id": str(r["task_id"]), "question": r["text"], "target": r["code"], "test_list": r["test_list"]}),
}


def read(name: str, choices: bool) -> list[Item]:
    """The items of a file as the hub has them. Raises `DataError` where it does not, or `datasets` is missing."""
    if name not in HUB:
        raise DataError(f"{name}: no data set on the hub is known for it; give --data a folder with the file")
    repository, split, convert = HUB[name]
    items = []
    for where, row in _hub_rows(f"hub:{repository}:{split}"):
        try:
            items.append(_item(convert(row), where, choices))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: not as expected ({error!r}); give --data a folder with the file") from None
    return items
