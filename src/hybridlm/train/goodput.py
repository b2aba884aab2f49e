"""What share of a run's time went into training, and where the rest went: read from its events alone.

A restart is counted from the fault, where it was injected or can be dated by the last step before it, to the first step
that had never been done before: detection, start, loading and the replay of lost steps are all in it.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from hybridlm.atomic import write_file
from hybridlm.errors import DataError
from hybridlm.train.events import read_events

__all__ = ["goodput", "write_goodput"]

MAIN = "rank-00000"  # whose events are counted
LEAVING = ("kill", "freeze", "agent", "damage", "flip", "sigterm")  # faults that end in a start


def goodput(out: Path) -> dict[str, Any]:
    """The figures of the run in `out`, plain data; times in seconds. Raises `DataError` when nothing was logged.

    `active` is the time of steps done for the first time, less what they waited for checkpoints, over all the time from
    the first step's begin to the last's end, pauses between two launches included.
    """
    events = read_events(out)
    first = [e for e in events if e["kind"] == "step_new" and e["who"] == MAIN]
    if len(first) < 2:
        raise DataError(f"{out}: fewer than two steps are in its events/, so there is nothing to measure")
    starts = [e["time"] for e in events if e["kind"] == "start" and e["who"] == MAIN]
    own = [e for e in events if e["who"] == MAIN and e["kind"] in ("step_new", "step_again", "start", "resumed")]
    took = []  # seconds of each new step whose predecessor was done by the same process
    for before, now in pairwise(own):
        if now["kind"] == "step_new" and before["kind"] in ("step_new", "step_again"):
            took.append(now["time"] - before["time"])
    typical = median(took)
    wall = first[-1]["time"] - first[0]["time"] + typical
    useful = sum(took) + typical * (len(first) - len(took))
    again = [e for e in events if e["kind"] == "step_again" and e["who"] == MAIN]
    stalls = [e["seconds"] for e in events if e["kind"] == "checkpoint_stall" and e["who"] == MAIN]
    commits = [e["seconds"] for e in events if e["kind"] == "checkpoint_commit" and e["who"] == MAIN]
    found = _recoveries(events, starts, first)
    times = sorted(r["seconds"] for r in found if r["seconds"] is not None)
    run = _recipe(out)
    per_step = run.get("batch", 0) * run.get("sequence", 0)
    tokens_per_s = len(first) * per_step / wall
    return {
        "steps": len(first), "seconds": round(wall, 2), "step_seconds": round(typical, 4),
        "active": round(min(1.0, max(0.0, useful - sum(stalls)) / wall), 4), "restarts": len(starts) - 1,
        "steps_lost": len(again),
        "recovery": {"count": len(times), "median": _quantile(times, 0.5), "p95": _quantile(times, 0.95),
                     "longest": _quantile(times, 1.0)},
        "checkpoints": {"count": len(commits), "stall_seconds": round(sum(stalls), 3),
                        "stall_share": round(sum(stalls) / wall, 5), "write_seconds": _quantile(sorted(commits), 0.5),
                        "failed": _count(events, "checkpoint_failed"),
                        "damaged": _count(events, "checkpoint_damaged")},
        "skipped": len({e["step"] for e in events if e["kind"] == "skip"}), "tokens_per_s": round(tokens_per_s, 1),
        "mfu": _mfu(run, events, tokens_per_s), "recoveries": found,
    }


def write_goodput(out: Path) -> dict[str, Any]:
    """Compute and leave OUT/goodput.json."""
    figures = goodput(out)
    write_file(out / "goodput.json", json.dumps(figures, indent=1).encode())
    return figures


def _recoveries(events: list[dict[str, Any]], starts: list[float], first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each disturbance: injected faults, and starts that no injected fault explains (dated by the last step before)."""
    faults = [e for e in events if e["kind"] == "fault"]
    found, explained = [], set()
    for number, fault in enumerate(faults):
        until = faults[number + 1]["time"] if number + 1 < len(faults) else float("inf")
        begun = fault["time"]
        if fault["what"] in LEAVING:
            begun = next((s for s in starts if s > fault["time"]), float("inf"))
            if begun < until:
                explained |= {s for s in starts if fault["time"] < s < until}
        done = next((e for e in first if e["time"] > begun), None)
        found.append({"what": fault["what"], "time": fault["time"],
                      "seconds": round(done["time"] - fault["time"], 3) if done else None})
    for start in starts[1:]:
        near = [f["time"] for f in faults if f["what"] in LEAVING and 0 <= start - f["time"] < 60]
        if start in explained or near:
            continue
        before = max((e["time"] for e in first if e["time"] < start), default=start)
        done = next((e for e in first if e["time"] > start), None)
        found.append({"what": "restart", "time": before, "seconds": round(done["time"] - before, 3) if done else None})
    return sorted(found, key=lambda r: r["time"])


def _recipe(out: Path) -> dict[str, Any]:
    try:
        recipe: dict[str, Any] = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recipe


def _mfu(run: dict[str, Any], events: list[dict[str, Any]], tokens_per_s: float) -> float | None:
    """Share of the peak of all GPUs, where it is known and the arithmetic is bfloat16."""
    from hybridlm.config import HybridConfig
    from hybridlm.train.speed import PEAKS, flops_per_token

    start = next((e for e in events if e["kind"] == "start"), {})
    peak = next((peak for word, peak in PEAKS.items() if word in start.get("device", "")), None)
    if not peak or run.get("dtype") != "bfloat16":
        return None
    each = flops_per_token(HybridConfig.from_dict(run["model"]), run["sequence"])
    return round(tokens_per_s * each / (peak * start["world"]), 4)


def _count(events: list[dict[str, Any]], kind: str) -> int:
    return sum(e["kind"] == kind and e["who"] == MAIN for e in events)


def _quantile(ordered: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed."""
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3) if ordered else None
