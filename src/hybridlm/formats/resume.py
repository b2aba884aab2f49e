"""A large file written piece by piece that a stopped writer's successor goes on with.

The file grows as OUT.partial; OUT.partial.journal has a line for each finished piece, with its end and its checksum.
The next writer with the same key (what the file is made of) checks the pieces that are there, cuts off what is not
whole, and goes on; with another key it starts again. Complete, the file takes its name and the journal goes. A kill or
Ctrl-C leaves both files for the next time, an error removes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hybridlm.atomic import require_space
from hybridlm.errors import HybridLMError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Pieces", "resumable_write"]

_CHUNK = 8 << 20


class Pieces:
    """The file, open after its last whole piece; `done` pieces are there already."""

    def __init__(self, file: BinaryIO, journal: BinaryIO, key: str) -> None:
        self._file, self._journal = file, journal
        self.done, self._crc = 0, 0
        end, lines = 0, [json.dumps({"key": key}).encode()]
        held = journal.read().splitlines()
        if held and held[0] == lines[0]:
            for line in held[1:]:
                piece = _parse(line)
                if piece is None or not self._whole(end, *piece):
                    break
                end, self.done = piece[0], self.done + 1
                lines.append(line)
        journal.seek(0)
        journal.truncate()
        journal.write(b"".join(line + b"\n" for line in lines))
        journal.flush()
        file.truncate(end)
        file.seek(end)

    def _whole(self, start: int, end: int, crc: int) -> bool:
        self._file.seek(start)
        found, left = 0, end - start
        while left > 0 and (chunk := self._file.read(min(left, _CHUNK))):
            found, left = zlib.crc32(chunk, found), left - len(chunk)
        return left == 0 and found == crc

    def write(self, data: Any) -> None:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)

    def tell(self) -> int:
        return self._file.tell()

    def finish(self) -> None:
        """What was written since the last call is a piece."""
        self._file.flush()
        self._journal.write(json.dumps([self.tell(), self._crc]).encode() + b"\n")
        self._journal.flush()
        self.done, self._crc = self.done + 1, 0


@contextlib.contextmanager
def resumable_write(path: str | Path, key: str, size: int) -> Iterator[Pieces]:
    """Open OUT.partial, new or where it stopped; when the block ends well it becomes `path`."""
    target = Path(path)
    partial, log = (target.with_name(f"{target.name}.{end}") for end in ("partial", "partial.journal"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as open_files:
        try:
            file = open_files.enter_context(_open(partial))
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise HybridLMError(f"{partial}: another process is writing it; wait for it, or give another "
                                        "name") from None
                except OSError:
                    pass  # a file system without locks
            journal = open_files.enter_context(_open(log))
        except OSError as error:
            raise HybridLMError(f"{target}: cannot be written ({error.strerror})") from None
        try:
            pieces = Pieces(file, journal, key)
            require_space(target.parent, size - pieces.tell())
            yield pieces
            file.flush()
            os.fsync(file.fileno())
        except Exception:
            _remove(partial, log)
            raise
        if fcntl is None:
            open_files.close()
        partial.replace(target)
        _remove(log)


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")


def _parse(line: bytes) -> tuple[int, int] | None:
    try:
        end, crc = json.loads(line)
        return int(end), int(crc)
    except (ValueError, TypeError):
        return None


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
