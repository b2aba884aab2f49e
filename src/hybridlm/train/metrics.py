"""What a run says while it runs: each step's record to every sink (see `sinks.py`), and lines for people."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridlm.train.recipe import Recipe
from hybridlm.train.sinks import Console, JsonLines, Sink, TensorBoard, load_sink

__all__ = ["Metrics"]


class Metrics:
    """`metrics.jsonl`, which a run cannot do without; TensorBoard, the terminal and the user's own sinks, which it can:
    one of those that fails is told and left out from then on."""

    def __init__(self, out: Path, step: int, recipe: Recipe) -> None:
        """`step`: how many steps the checkpoint being resumed has behind it; what was logged later is cut off."""
        own = [load_sink(name)(out, recipe.to_dict()) for name in recipe.sinks.split(",") if name.strip()]
        self._lines = JsonLines(out / "metrics.jsonl", step)
        self._console = Console(0 if recipe.seconds else recipe.steps, step)
        self._others: list[Sink] = [self._console, *own]
        if recipe.tensorboard:
            with suppress(ImportError):
                self._others.append(TensorBoard(out / "tensorboard", step))

    def log(self, record: dict[str, Any], *, eta: float) -> None:
        """Write one step's record; `eta` is the seconds left, for the display."""
        self._lines.write(record)
        self._console.left = eta
        for sink in list(self._others):
            try:
                sink.write(dict(record))
            except Exception as error:
                self._others.remove(sink)
                self.say(f"{type(sink).__name__} failed ({error}) and gets no more records; metrics.jsonl has them all")

    def sync(self) -> None:
        """Make what was written last through a power cut; done before a checkpoint that counts on it."""
        self._lines.sync()

    def say(self, line: str) -> None:
        """A line for people."""
        self._console.say(line)

    def close(self) -> None:
        self._lines.close()
        for sink in self._others:
            with suppress(Exception):
                sink.close()
