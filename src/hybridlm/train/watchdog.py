"""Whether every process is alive and getting on: each one beats, the launcher of its machine listens.

A process maps a file of a few bytes and writes the time into it: a thread does, four times a second, which shows that
the process runs at all (one that is stopped, or swapped out for good, does not), and the loop does after every step,
which shows that training gets on. The clock is the machine's monotonic one, common to its processes, so nothing is
sent and nothing waits: a beat costs less than a microsecond.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FOLDER", "Beat", "Pulse", "Watch"]

FOLDER = "HYBRIDLM_BEATS"  # the environment's name of the folder that beats are written to
LAYOUT = struct.Struct("<dddqq")  # alive at, got on at, longest recent step in seconds, step, rank (-1: an agent)
SILENT = 3.0  # seconds without a sign of life, at the least, after which a process counts as frozen
STUCK = 60.0  # seconds without progress of any rank, at the least, after which the slowest is killed
_BEATS: dict[int, Beat] = {}  # by process, as a forked one must not use its parent's


class Beat:
    """One process's beats. Without a launcher nothing happens."""

    def __init__(self, folder: str | Path | None, rank: int) -> None:
        self._map: mmap.mmap | None = None
        self._rank, self._step, self._last, self._longest = rank, -1, 0.0, 0.0
        if not folder:
            return
        path = Path(folder) / str(os.getpid())
        now = time.monotonic()
        path.with_suffix(".new").write_bytes(LAYOUT.pack(now, 0.0, 0.0, -1, rank))
        path.with_suffix(".new").rename(path)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), LAYOUT.size)
        threading.Thread(target=self._live, name="beat", daemon=True).start()

    @classmethod
    def from_environment(cls) -> Beat:
        """This process's, as a rank that `hybridlm train --nproc` started; always the same one."""
        pid = os.getpid()
        if pid not in _BEATS:
            _BEATS[pid] = cls(os.environ.get(FOLDER), int(os.environ.get("RANK", "0")))
        return _BEATS[pid]

    def beat(self, step: int) -> None:
        """Training got on: `step` is done."""
        if self._map is None:
            return
        now = time.monotonic()
        if self._last:
            self._longest = max(0.98 * self._longest, now - self._last)
        self._step, self._last = step, now
        struct.pack_into("<ddqq", self._map, 8, now, self._longest, step, self._rank)

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Within, no progress is expected: validation, export, the first step's compilation."""
        if self._map is not None:
            struct.pack_into("<d", self._map, 8, 0.0)
        yield
        self._last = 0.0
        if self._map is not None and self._step >= 0:
            struct.pack_into("<d", self._map, 8, time.monotonic())

    def _live(self) -> None:
        while self._map is not None:
            struct.pack_into("<d", self._map, 0, time.monotonic())
            time.sleep(0.25)


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a process's beats say; times in seconds ago, `idle` 0 where no progress is expected."""

    pid: int
    rank: int
    silent: float
    idle: float
    longest: float
    step: int


class Watch:
    """The launcher's ear: which local processes are frozen or stuck."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pulses(self) -> list[Pulse]:
        """Every local process that beats and exists."""
        now, found = time.monotonic(), []
        for path in self.folder.iterdir():
            if not path.name.isdigit():
                continue
            pid = int(path.name)
            try:
                os.kill(pid, 0)
                alive, got_on, longest, step, rank = LAYOUT.unpack(path.read_bytes())
            except (OSError, struct.error):
                with suppress(OSError):
                    path.unlink()
                continue
            found.append(Pulse(pid, rank, now - alive, now - got_on if got_on else 0.0, longest, step))
        return found

    def sick(self) -> list[tuple[Pulse, str]]:
        """Processes to kill, each with what is wrong with it."""
        found = self.pulses()
        frozen = [(p, f"no sign of life for {p.silent:.1f} s") for p in found
                  if p.silent > max(SILENT, min(2 * p.longest, 10 * SILENT))]
        ranks = [p for p in found if p.rank >= 0]
        if frozen or not ranks or not all(p.idle > max(STUCK, 20 * p.longest) for p in ranks):
            return frozen
        last = min(ranks, key=lambda p: (p.step, -p.idle))  # the others wait for it
        return [(last, f"no step for {last.idle:.0f} s")]
