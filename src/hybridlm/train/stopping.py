"""Being asked to stop: SIGINT and SIGTERM are noted, and acted on between steps; a second one acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["asked_to_stop"]


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """The numbers of the signals that have come since it was entered."""
    asked: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
