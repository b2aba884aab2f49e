"""Stages of long work, shown on stderr: a bar each in a terminal, a line each where output goes to a file.

Nothing is drawn, and nothing imported for it, until there is something to show.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["Stages"]


class Stages:
    """A `store.Report`: called with (stage, done, total), in bytes; a total of 0 is a line of text."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            if stage not in self._tasks:
                self._tasks[stage] = None
                print(stage, file=sys.stderr, flush=True)
            return
        if self._bars is None:
            self._bars = self._start()
        if not total:
            self._bars.console.print(stage, highlight=False, markup=False)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def status(self, line: str) -> None:
        """A line that replaces the one before it; in a terminal only."""
        if sys.stderr.isatty():
            if self._bars is None:
                self._bars = self._start("{task.description}")
            if not self._tasks:
                self._tasks[""] = self._bars.add_task(line, total=None)
            self._bars.update(self._tasks[""], description=line)

    def _start(self, *columns: str) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        usual = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                 TimeRemainingColumn())
        bars = Progress(*(columns or usual), console=Console(stderr=True), transient=bool(columns))
        bars.start()
        return bars

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
