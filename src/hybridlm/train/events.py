"""The log of what happened to a run, across all its processes and restarts: one JSON line each, with the wall time.

    OUT/events/rank-00000.jsonl       a rank: start, step_new, step_again, checkpoint_*, fault, skip, resumed, stop
    OUT/events/launcher-HOST.jsonl    a launcher: detected, restart, stop

A file has one writer at a time and is only ever appended to, so a killed process costs at most its last line.
`hybridlm.train.goodput` reads them all.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError

__all__ = ["Events", "read_events"]


class Events:
    """Appends to one process's log.

    Args:
        who: a rank's number, or a name such as "launcher-HOST".
    """

    def __init__(self, out: Path, who: int | str) -> None:
        self.name = f"rank-{who:05d}" if isinstance(who, int) else who
        path = out / "events" / f"{self.name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = _parse(path.read_bytes(), self.name) if path.exists() else []
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); give another out=") from None
        self.furthest = max((e["step"] for e in before if e["kind"] == "step_new"), default=0)
        os.write(self._file, b"\n")  # ends what a killed process may have left half-written

    def write(self, kind: str, **fields: Any) -> None:
        """One event, now. A full disk loses the event, never the run."""
        line = json.dumps({"time": round(time.time(), 4), "kind": kind, **fields}) + "\n"
        try:
            os.write(self._file, line.encode())
        except OSError:
            return

    def step(self, step: int, **fields: Any) -> None:
        """A step is done: `step_new` the first time in the life of the run, `step_again` when it is a replay."""
        self.write("step_new" if step > self.furthest else "step_again", step=step, **fields)
        self.furthest = max(self.furthest, step)

    def close(self) -> None:
        os.close(self._file)


def read_events(out: Path) -> list[dict[str, Any]]:
    """Everything that happened to a run, in the order of time; `who` names the writer."""
    events = [e for file in sorted((out / "events").glob("*.jsonl")) for e in _parse(file.read_bytes(), file.stem)]
    return sorted(events, key=lambda e: e["time"])


def _parse(data: bytes, who: str) -> list[dict[str, Any]]:
    """The whole lines."""
    events = []
    for line in data.split(b"\n"):
        try:
            event = json.loads(line)
            events.append({**event, "time": float(event["time"]), "kind": str(event["kind"]), "who": who})
        except (ValueError, KeyError, TypeError):
            continue
    return events
