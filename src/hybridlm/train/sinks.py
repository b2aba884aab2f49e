"""Where a run's records go. A sink is anything with `write(record)` and `close()`; only the first rank has any.

    class Mine:
        def write(self, record: dict) -> None: ...     # one object a step: step, loss, lr, grad_norm, tokens, ...
        def close(self) -> None: ...

    def make(out: Path, recipe: dict) -> Mine: ...

`hybridlm train ... sinks=my_module:make` (or `my_file.py:make`, several with commas) sends every record there as well.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from hybridlm.atomic import write_file
from hybridlm.errors import ConfigError, DataError

__all__ = ["Console", "JsonLines", "Sink", "TensorBoard", "load_sink"]


class Sink(Protocol):
    """Takes the records of steps, in order. After a resumption it gets the steps since the checkpoint again."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """OUT/metrics.jsonl: one object a step, handed to the system at once, so that a killed process loses none."""

    def __init__(self, path: Path, step: int) -> None:
        """`step`: how many steps the checkpoint being resumed has behind it; later lines are cut off."""
        if path.exists():
            write_file(path, _upto(path.read_bytes(), step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self._file.name}: cannot be written ({error.strerror}); the checkpoints are untouched, "
                            "make room and run the same command again") from None

    def sync(self) -> None:
        """Make what was written last through a power cut; done before a checkpoint that counts on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """OUT/tensorboard: every number of a record as a scalar."""

    def __init__(self, folder: Path, step: int) -> None:
        """Raises `ModuleNotFoundError` where TensorBoard is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._board.close()


class Console:
    """For people, on stderr: in a terminal one live line, elsewhere a line every few seconds."""

    def __init__(self, total: int, step: int) -> None:
        """`total`: steps of the run, 0 when a clock ends it."""
        self.left = math.inf  # seconds, set from outside
        self.total, self.last = total, -math.inf
        self._bar = _Bar(total, step) if sys.stderr.isatty() else None

    def write(self, record: dict[str, Any]) -> None:
        if self._bar:
            self._bar.show(record, self.left)
        elif time.monotonic() - self.last > 5 or "val_bits_per_byte" in record or record["step"] == self.total:
            self.last = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            self.say(f"step {record['step']}{of}  {figures(record, self.left)}")

    def say(self, line: str) -> None:
        """A line for people."""
        if self._bar:
            self._bar.say(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.close()


class _Bar:
    """One live line; validation and notes scroll above it."""

    def __init__(self, total: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = [BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}")] if total else \
            [TextColumn("step {task.completed}  {task.description}")]
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task("", total=total or None, completed=step)
        self.progress.start()

    def show(self, record: dict[str, Any], left: float) -> None:
        self.progress.update(self.task, completed=record["step"], description=figures(record, left))
        if "val_bits_per_byte" in record:
            self.say(f"step {record['step']}  {figures(record, math.inf)}")

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        self.progress.stop()


def figures(record: dict[str, Any], left: float) -> str:
    """The record in words; `left` in seconds."""
    parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"{record['tokens_per_s']:,.0f} tok/s"]
    if "val_bits_per_byte" in record:
        parts.insert(1, f"val {record['val_bits_per_byte']:.4f} bits/byte")
    if record.get("skipped"):
        parts.append("update left out")
    if math.isfinite(left):
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return "  ".join(parts)


def load_sink(name: str) -> Callable[[Path, dict[str, Any]], Sink]:
    """The function behind "module:function" or "file.py:function". Raises `ConfigError` naming what is not there."""
    where, _, function = name.strip().rpartition(":")
    if not where or not function:
        raise ConfigError(f"sinks: {name!r} is not MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        held = runpy.run_path(where) if where.endswith(".py") else vars(import_module(where))
    except (ImportError, OSError) as error:
        raise ConfigError(f"sinks: {where} cannot be loaded ({error})") from None
    if not callable(held.get(function)):
        raise ConfigError(f"sinks: {where} has no function {function}")
    made: Callable[[Path, dict[str, Any]], Sink] = held[function]
    return made


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a figure that is none is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _upto(data: bytes, step: int) -> bytes:
    """The whole lines whose step is at most `step`."""
    kept = []
    for line in data.split(b"\n")[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    return b"".join(kept)
