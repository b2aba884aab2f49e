"""Reading: training runs as curves and decayed points, and JSON files of points.

A run folder is what `hybridlm train` leaves: `metrics.jsonl`, and where present `recipe.json`, `result.json` and
`tokens/manifest.json`. Only numbers are taken from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.config import HybridConfig
from hybridlm.errors import ConfigError, DataError
from hybridlm.scaling.points import Point

__all__ = ["Gathered", "Run", "decay_ends", "gather", "is_number", "read_json", "read_points", "read_run"]

_RANGES = {"params": (1, 1e18), "tokens": (1, 1e18), "loss": (1e-6, 1e6)}
DECAYED = 0.2  # a learning rate at most this share of its peak counts as decayed
NEAR = 0.99  # a validation belongs to the end of a decay if it came after this share of its tokens


@dataclass(frozen=True)
class Run:
    """One run's curves. `columns`: from each key of metrics.jsonl to float64 [records], NaN where it was not logged."""

    name: str
    path: Path
    arm: str
    params: float | None  # outside the token tables; None without recipe.json
    recipe: dict[str, Any]
    result: dict[str, Any]
    columns: dict[str, np.ndarray]
    unique_tokens: float | None

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, values) of the records that hold `key`."""
        values = self.columns.get(key, np.full(len(self.tokens), np.nan))
        held = np.isfinite(values)
        return self.tokens[held], values[held]

    @property
    def tokens(self) -> np.ndarray:
        return self.columns["tokens"]

    @property
    def schedule(self) -> str:
        return str(self.recipe.get("schedule", ""))

    @property
    def val_bits_per_byte(self) -> dict[str, float]:
        """The final validation by domain, "all" among them; empty for a run that has not ended."""
        found = self.result.get("val_bits_per_byte")
        return {str(k): float(v) for k, v in found.items() if is_number(v)} if isinstance(found, dict) else {}

    def epochs(self, tokens: float) -> float | None:
        return tokens / self.unique_tokens if self.unique_tokens else None


def read_run(path: str | Path, arm: str = "") -> Run:
    """Read a run folder. Raises `DataError` naming the file and what to do."""
    path = Path(path)
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{path}: no metrics.jsonl in it; give a folder that `hybridlm train ... out=DIR` has written")
    recipe, result = (_optional(path / name) for name in ("recipe.json", "result.json"))
    params, found = None, ""
    if isinstance(recipe.get("model"), dict):
        try:
            config = HybridConfig.from_dict(recipe["model"])
        except ConfigError as error:
            raise DataError(f"{path / 'recipe.json'}: {error}; restore the file that the run wrote") from None
        params, found = float(config.num_parameters(embedding=False)), _arm(config)
    name = path.name if path.name not in ("", ".", "..") else path.resolve().name
    return Run(name, path, arm or found or name, params, recipe, result, _columns(metrics), _unique(path, recipe))


def decay_ends(run: Run) -> list[int]:
    """The records at which a decay of the learning rate has come to its end: several in a WSD-S run, often one."""
    rate = run.columns.get("lr")
    if rate is None or not np.isfinite(rate).all() or rate.max() <= 0:
        return []
    low = rate <= DECAYED * rate.max()
    ends = []
    for i in range(int(rate.argmax()), len(rate)):
        last = i == len(rate) - 1
        if low[i] and (last or (rate[i + 1] > 1.5 * rate[i] and rate[i + 1:].max() > DECAYED * rate.max())):
            ends.append(i)
    return ends


@dataclass
class Gathered:
    """Points and runs from several places, the unit of the loss, and what was left out and why."""

    points: list[Point] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    unit: str = "bits per byte"
    notes: list[str] = field(default_factory=list)


def gather(paths: Iterable[str | Path]) -> Gathered:
    """Read points files (.json) and run folders, each as PATH or ARM=PATH."""
    out = Gathered()
    units: set[str] = set()
    seen: set[Path] = set()
    for given in paths:
        arm, path = _named(str(given))
        if path.resolve() in seen:
            raise DataError(f"{path}: given twice; leave one out")
        seen.add(path.resolve())
        if path.is_dir():
            out.runs.append(read_run(path, arm))
        elif path.is_file():
            points, unit = read_points(path, arm)
            out.points += points
            units.add(unit)
        else:
            raise DataError(f"{path}: no such file or folder; give run folders or a .json of points")
    if out.runs:
        found, notes = _points_of(out.runs)
        out.points += found
        out.notes += notes
        units |= {"bits per byte"} if found else set()
    if len(units) > 1:
        raise DataError(f"points in {' and in '.join(sorted(units))} do not belong in one fit; give them apart")
    out.unit = units.pop() if units else out.unit
    return out


def read_points(path: Path, arm: str = "") -> tuple[list[Point], str]:
    """Points of a JSON file and the unit of their losses.

    The file is a list of objects, or {"points": [...], "unit": "nats"}. An object has `params`, `tokens` and `loss`,
    and may have `arm`, `epochs` or `unique_tokens`, and `run`.
    """
    data = read_json(path)
    rows = data.get("points") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not rows:
        raise DataError(f'{path}: holds no points; write [{{"arm": "hybrid", "params": 6e7, "tokens": 1.2e9, '
                        '"loss": 3.1}}, ...]')
    points = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: point {i} is no object; give each params, tokens and loss")
        for key, (low, high) in _RANGES.items():
            if not is_number(row.get(key)) or not low <= row[key] <= high:
                raise DataError(f"{path}: point {i}: {key} must be a number from {low:g} to {high:g}, not "
                                f"{str(row.get(key))[:40]}")
        for key in ("epochs", "unique_tokens"):
            if row.get(key) is not None and (not is_number(row[key]) or row[key] <= 0):
                raise DataError(f"{path}: point {i}: {key} must be a positive number or left out, not "
                                f"{str(row[key])[:40]}")
        unique = row.get("unique_tokens")
        epochs = row.get("epochs") or (row["tokens"] / unique if unique else None)
        points.append(Point(arm or str(row.get("arm") or path.stem), float(row["params"]), float(row["tokens"]),
                            float(row["loss"]), epochs, str(row.get("run", ""))))
    return points, str(data.get("unit", "loss")) if isinstance(data, dict) else "loss"


def read_json(path: Path) -> Any:
    """The file's value; `DataError` names the file where that cannot be had."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON ({error}); write it anew, or leave it out") from None


def _points_of(runs: Sequence[Run]) -> tuple[list[Point], list[str]]:
    """The decayed points of runs, all judged by one validation: the full one at the end if each run has but one."""
    notes: list[str] = []
    ends = {}
    for i, run in enumerate(runs):
        ends[i] = decay_ends(run)
        if run.params is None:
            notes.append(f"{run.path}: no recipe.json, so its size is unknown; not among the points")
            ends[i] = []
        elif not ends[i]:
            notes.append(f"{run.path}: never decays its learning rate to {DECAYED:.0%} of the peak; not among the "
                         "points, its curve is compared in the same phase")
    full = all(len(e) <= 1 and (not e or "all" in runs[i].val_bits_per_byte) for i, e in ends.items())
    points = []
    for i, run in enumerate(runs):
        tokens, values = run.series("val_bits_per_byte")
        for end in ends[i]:
            at = float(run.tokens[end])
            near = values[(tokens <= at) & (tokens >= NEAR * at)]
            if full:
                loss = run.val_bits_per_byte["all"]
            elif len(near):
                loss = float(near[-1])
            else:
                notes.append(f"{run.path}: no validation at the end of the decay at {at:.3g} tokens; not a point; let "
                             "val_every fall on it")
                continue
            points.append(Point(run.arm, run.params or 0.0, at, loss, run.epochs(at), run.name))
    return points, notes


def _columns(path: Path) -> dict[str, np.ndarray]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    records = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not is_number(record["tokens"]):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            if i == len(lines) - 1:  # a run that is being written
                continue
            raise DataError(f"{path}, line {i + 1}: no record with tokens; delete the line, or restore the file") \
                from None
        records.append(record)
    if not records:
        raise DataError(f"{path}: holds no record; wait for the run's first step, or leave it out")
    keys = {k for r in records for k, v in r.items() if is_number(v)}
    out = {k: np.array([float(r[k]) if is_number(r.get(k)) else math.nan for r in records]) for k in keys}
    if (np.diff(out["tokens"]) < 0).any():
        raise DataError(f"{path}: tokens go back between lines; it holds more than one run, split it")
    return out


def _optional(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise DataError(f"{path}: no JSON object; restore the file that the run wrote, or remove it")
    return value


def _unique(path: Path, recipe: dict[str, Any]) -> float | None:
    """Tokens of the training text, each counted once."""
    if is_number(recipe.get("unique_tokens")):
        return float(recipe["unique_tokens"])
    shards = _optional(path / "tokens" / "manifest.json").get("shards")
    if not isinstance(shards, list):
        return None
    counts = [s["tokens"] for s in shards if isinstance(s, dict) and is_number(s.get("tokens"))
              and any(str(name).startswith("train") for name in s.get("files", ()))]
    return float(sum(counts)) or None


def _arm(config: HybridConfig) -> str:
    """What kind of model it is, in a word."""
    linear = sum(kind == "linear_attention" for kind in config.layer_types)
    attention = len(config.layer_types) - linear
    if not linear:
        return "transformer"
    beta = "" if config.linear_allow_neg_eigval else ", beta to 1"
    return ("gdn" if not attention else f"hybrid {linear / attention:.3g}:1") + beta


def _named(given: str) -> tuple[str, Path]:
    """ARM=PATH, unless the whole is a path itself."""
    arm, equals, path = given.partition("=")
    if equals and arm and path and not Path(given).exists() and "/" not in arm:
        return arm, Path(path)
    return "", Path(given)


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
