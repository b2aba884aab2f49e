"""Reading evaluation records: `results.json` of a folder, or of the folders in it.

Taken are a task's name and its numbers with their standard errors, in any of the shapes in which such files come:

    {"task": "arc_easy", "model": {"name": ...}, "figures": {"acc": {"value": 0.41, "stderr": 0.01}}}  (hybridlm eval)
    {"task": "arc_easy", "metrics": {"acc": 0.41, "acc_stderr": 0.01}}
    {"results": {"arc_easy": {"acc,none": 0.41, "acc_stderr,none": 0.01}}}     (lm-evaluation-harness)
    a list of the first two
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError
from hybridlm.scaling.runs import is_number, read_json

__all__ = ["Evaluation", "find_results", "read_evaluations"]

_COUNTS = {"items", "samples", "n", "seconds", "tokens", "bytes", "documents", "version", "seed", "shots",
           "num_fewshot"}


@dataclass(frozen=True)
class Evaluation:
    """One task of one model. `metrics`: name -> (value, standard error or None)."""

    model: str
    task: str
    metrics: dict[str, tuple[float, float | None]]
    items: int | None = None


def find_results(path: Path) -> list[Path]:
    """The results.json files of a folder or of folders in it, to two levels."""
    return sorted({*path.glob("results.json"), *path.glob("*/results.json"), *path.glob("*/*/results.json")})


def read_evaluations(path: str | Path) -> list[Evaluation]:
    """All records under `path`. Raises `DataError` naming the file where one is not to be understood."""
    path = Path(path)
    files = [path] if path.is_file() else find_results(path)
    if not files:
        raise DataError(f"{path}: no results.json in it; give a folder that `hybridlm eval ... --out DIR` has written")
    out: list[Evaluation] = []
    for file in files:
        found = list(_records(read_json(file), path.stem if path.is_file() else path.name))
        if not found:
            raise DataError(f"{file}: no task with a metric in it; run the evaluation to its end, or leave it out")
        out += found
    return out


def _records(data: Any, model: str) -> Iterator[Evaluation]:
    if isinstance(data, list):
        for entry in data:
            yield from _records(entry, model)
        return
    if not isinstance(data, dict):
        return
    name = data.get("model") or data.get("model_name") or model
    name = str(name.get("name") or model) if isinstance(name, dict) else Path(str(name)).name
    if isinstance(data.get("results"), dict):
        for task, metrics in data["results"].items():
            if isinstance(metrics, dict):
                yield from _one(name, str(task), metrics, metrics)
    elif isinstance(data.get("results"), list):
        for entry in data["results"]:
            yield from _records(entry, name)
    elif data.get("task"):
        metrics = next((data[k] for k in ("figures", "metrics") if isinstance(data.get(k), dict)), data)
        yield from _one(name, str(data["task"]), metrics, data)


def _one(model: str, task: str, metrics: dict[str, Any], about: dict[str, Any]) -> Iterator[Evaluation]:
    plain = {str(k).removesuffix(",none"): v for k, v in metrics.items()}
    found: dict[str, tuple[float, float | None]] = {}
    for key, value in plain.items():
        if "stderr" in key or key in _COUNTS:
            continue
        error: Any
        if isinstance(value, dict):
            held = value
            value, error = held.get("value", held.get("mean")), held.get("stderr", held.get("se"))
        else:
            error = plain.get(f"{key}_stderr", plain.get("stderr") if len(plain) <= 3 else None)
        if is_number(value):
            found[key] = (float(value), float(error) if is_number(error) else None)
    items = next((about[k] for k in ("items", "samples", "n") if is_number(about.get(k))), None)
    if found:
        yield Evaluation(model, task, found, int(items) if items is not None else None)
