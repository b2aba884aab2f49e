"""How a run's time was spent: its `goodput.json` and events as figures, a timeline, a table of disturbances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.errors import DataError
from hybridlm.report.content import Facts, Section, Table, Text
from hybridlm.scaling.runs import Run, is_number, read_json
from hybridlm.scaling.style import MARKERS, MUTED, Drawing, draw, hue

__all__ = ["Spent", "goodput_section", "read_spent"]

_WORDS = {"kill": "process killed", "freeze": "process frozen", "agent": "machine lost", "damage": "checkpoint damaged",
          "flip": "bit flipped", "sigterm": "asked to leave", "restart": "restart"}


@dataclass(frozen=True)
class Spent:
    """Figures of a run, and its progress: hours since the first step, and the step done then (replays among them)."""

    name: str
    figures: dict[str, Any]
    hours: np.ndarray
    steps: np.ndarray


def read_spent(run: Run) -> Spent | None:
    """None for a run without goodput.json. Raises `DataError` for one that is not to be understood."""
    file = run.path / "goodput.json"
    if not file.is_file():
        return None
    figures = read_json(file)
    if not isinstance(figures, dict) or not is_number(figures.get("active")) or not is_number(figures.get("seconds")):
        raise DataError(f"{file}: holds no active share and seconds; delete it, and it is made anew")
    times, steps = _progress(run.path)
    begun = times[0] if len(times) else 0.0
    return Spent(run.name, {**figures, "begun": begun}, (times - begun) / 3600, steps)


def goodput_section(all_: Sequence[Spent]) -> Section:
    """Of one run or several."""
    section = Section("Goodput")
    if len(all_) == 1:
        section.blocks.append(Facts(_facts(all_[0].figures)))
    else:
        words = list(dict.fromkeys(w for s in all_ for _, w in _facts(s.figures)))
        rows = [[s.name, *(next((v for v, k in _facts(s.figures) if k == w), "-") for w in words)] for s in all_]
        section.blocks.append(Table("", ("Run", *words), rows))
    for i, spent in enumerate(all_):
        if len(spent.steps) > 1:
            section.blocks.append(_timeline(spent, i))
        if found := [r for r in spent.figures.get("recoveries", []) if isinstance(r, dict)]:
            rows = [[_WORDS.get(str(r.get("what")), str(r.get("what"))), _clock(r.get("time"), spent),
                     f"{r['seconds']:.1f} s" if is_number(r.get("seconds")) else "never"] for r in found[:200]]
            title = f"Disturbances of {spent.name}" if len(all_) > 1 else "Disturbances"
            section.blocks.append(Table(title, ("What", "When", "Until work that was new"), rows))
    section.blocks.append(Text("The active share is the time of steps done for the first time, less what they waited "
                               "for checkpoints, over all time from the first step to the last.", aside=True))
    return section


def _facts(f: dict[str, Any]) -> list[tuple[str, str]]:
    recovery, saves = f.get("recovery") or {}, f.get("checkpoints") or {}
    told: list[tuple[Any, str, str]] = [
        (f.get("active"), "{:.1%}", "active share of the time"), (f.get("restarts"), "{:,}", "restarts"),
        (recovery.get("median"), "{:.1f} s", "recovery, median"), (recovery.get("p95"), "{:.1f} s", "recovery, p95"),
        (f.get("steps_lost"), "{:,}", "steps done again"), (saves.get("count"), "{:,}", "checkpoints"),
        (saves.get("stall_share"), "{:.2%}", "of the time waiting for checkpoints"),
        (f.get("skipped"), "{:,}", "updates left out"), (f.get("tokens_per_s"), "{:,.0f}", "tokens a second, all time"),
        (f.get("mfu"), "{:.1%}", "MFU, all time")]
    return [(form.format(value), what) for value, form, what in told if is_number(value)]


def _timeline(spent: Spent, number: int) -> Drawing:
    """Steps against time; where the line falls, work was lost, where it is level nothing was done."""
    faults = [(r["time"], str(r["what"])) for r in spent.figures.get("recoveries", [])
              if isinstance(r, dict) and is_number(r.get("time"))]
    units = (("hours", 1.0, 2.0), ("minutes", 60.0, 1 / 20), ("seconds", 3600.0, 0.0))
    unit, scale = next((u, s) for u, s, least in units if spent.hours[-1] >= least)

    def paint(figure: Any, narrow: bool) -> None:
        axis = figure.subplots()
        axis.plot(spent.hours * scale, spent.steps, color=hue(0), linewidth=1.6)
        for k, what in enumerate(dict.fromkeys(w for _, w in faults)):
            at = np.array([(t - spent.figures["begun"]) / 3600 for t, w in faults if w == what])
            done = np.interp(at, spent.hours, spent.steps)
            axis.plot(at * scale, done, MARKERS[k % len(MARKERS)], color=hue(k + 1), linestyle="", label=_WORDS.get(
                what, what))
        axis.set(xlabel=f"{unit} since the first step", ylabel="step")
        axis.set_xlim(left=0)
        axis.tick_params(colors=MUTED)
        if faults:
            axis.legend(loc="upper left", ncols=1 if narrow else 2)

    count = f"{len(faults)} disturbance{'s' if len(faults) > 1 else ''}"
    told = count if faults else "nothing disturbed it"
    return draw(f"timeline{number}", f"Steps of {spent.name} against time; {told}.", "Steps against time, "
                f"{spent.name}: {told}. Where the line falls back, steps were done again.", paint, wide=(8.6, 3.2))


def _progress(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, step) of each step that the first rank did, as its events have them."""
    files = sorted((path / "events").glob("rank-*.jsonl"))
    rows = []
    for line in files[0].read_bytes().split(b"\n") if files else []:
        try:
            event = json.loads(line)
            if event["kind"] in ("step_new", "step_again"):
                rows.append((float(event["time"]), float(event["step"])))
        except (ValueError, KeyError, TypeError):  # a line that a killed process left half written
            continue
    rows.sort()
    return np.array([t for t, _ in rows]), np.array([s for _, s in rows])


def _clock(time: Any, spent: Spent) -> str:
    if not is_number(time) or not spent.figures["begun"]:
        return "-"
    seconds = max(0, round(time - spent.figures["begun"]))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
