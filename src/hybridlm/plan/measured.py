"""The simulator against runs that happened: from a run's `goodput.json` to what would have been predicted for it.

Taken from the run are the rate of failures, how often it saved and what that cost, and how long restarts took. What the
simulator has to find by itself is the work done again, and with it the goodput.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError
from hybridlm.plan.goodput import Faults, Outcome, simulate

HARMLESS = ("nan", "full")  # a batch left out, a checkpoint that found no room

__all__ = ["faults_of", "predict", "read_goodput"]


def read_goodput(path: str | Path) -> dict[str, Any]:
    """The figures of a run's folder or of a goodput.json. Raises `DataError` naming the file."""
    file = Path(path) / "goodput.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        faults_of(found)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(f"{file}: no goodput of a run with checkpoints ({error}); give a run's folder after "
                        "hybridlm report") from None
    return dict(found)


def faults_of(figures: Mapping[str, Any]) -> Faults:
    """The run as the simulator's input, seconds. Disturbances that stop nothing (a bad batch) are no failures."""
    wall, saves = figures["seconds"], figures["checkpoints"]
    took = [r["seconds"] for r in figures["recoveries"] if r["what"] not in HARMLESS and r["seconds"] is not None]
    work = figures["active"] * wall
    step = work / figures["steps"]
    down = max(0.0, (sum(took) - figures["steps_lost"] * step) / len(took)) if took else 0.0
    return Faults(mtbf=(wall - len(took) * down) / len(took) if took else math.inf,
                  interval=(work + figures["steps_lost"] * step) / saves["count"],
                  stall=saves["stall_seconds"] / saves["count"], write=saves["write_seconds"] or 0.0, restart=down)


def predict(figures: Mapping[str, Any], *, runs: int = 400) -> tuple[Outcome, float]:
    """(what is simulated for such a run, seconds of work that the run itself did again)."""
    work = figures["active"] * figures["seconds"]
    return simulate(faults_of(figures), work, runs=runs), figures["steps_lost"] * work / figures["steps"]
