"""What a run says while it runs: `metrics.jsonl`, TensorBoard where it is installed, and a line or a bar for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from hybridlm.atomic import write_file
from hybridlm.errors import DataError

__all__ = ["Metrics"]


class Metrics:
    """One object a step, appended and flushed to the system, so that a killed process loses none that was written."""

    def __init__(self, out: Path, step: int, *, total: int, tensorboard: bool) -> None:
        """`step`: how many steps the checkpoint being resumed has behind it; later lines are cut off."""
        path = out / "metrics.jsonl"
        if path.exists():
            write_file(path, _upto(path.read_bytes(), step))
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(out / "tensorboard", step) if tensorboard else None
        self._display = _Bar(total, step) if sys.stderr.isatty() else _Lines(total)

    def log(self, record: dict[str, Any], *, eta: float) -> None:
        """Write one step's record; `eta` is the seconds left, for the display."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self._file.name}: cannot be written ({error.strerror}); the checkpoints are untouched, "
                            "make room and run the same command again") from None
        if self._board:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, record["step"])
        self._display.show(record, eta)

    def sync(self) -> None:
        """Make what was written last through a power cut; done before a checkpoint that counts on it."""
        os.fsync(self._file.fileno())

    def say(self, line: str) -> None:
        """A line for people."""
        self._display.say(line)

    def close(self) -> None:
        self._file.close()
        self._display.close()
        if self._board:
            self._board.close()


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


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def figures(record: dict[str, Any], eta: float) -> str:
    """The record in words."""
    parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"{record['tokens_per_s']:,.0f} tok/s"]
    if "val_bits_per_byte" in record:
        parts.insert(1, f"val {record['val_bits_per_byte']:.4f} bits/byte")
    if math.isfinite(eta):
        parts.append(f"{int(eta) // 60}:{int(eta) % 60:02d} left")
    return "  ".join(parts)


class _Lines:
    """For logs: a line every few seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.last = total, -math.inf

    def show(self, record: dict[str, Any], eta: float) -> None:
        if time.monotonic() - self.last > 5 or "val_bits_per_byte" in record or record["step"] == self.total:
            self.last = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            self.say(f"step {record['step']}{of}  {figures(record, eta)}")

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """For terminals: one live line; validation and notes scroll above it."""

    def __init__(self, total: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = [BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}")] if total else \
            [TextColumn("step {task.completed}  {task.description}")]
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task("", total=total or None, completed=step)
        self.progress.start()

    def show(self, record: dict[str, Any], eta: float) -> None:
        self.progress.update(self.task, completed=record["step"], description=figures(record, eta))
        if "val_bits_per_byte" in record:
            self.say(f"step {record['step']}  {figures(record, math.inf)}")

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        self.progress.stop()
