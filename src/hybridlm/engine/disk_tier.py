"""The prefix cache's second tier: checkpoints on a disk, under a budget of its own.

A folder belongs to one model and one process at a time (a lock sees to that). Each checkpoint is a file that says what
it has read and names its blocks (full KV pages); each block is a file named by the SHA-256 of its bytes, so that what
checkpoints share lies there once. Files appear whole (`atomic.py`), and everything has a checksum that is looked at
when it is read: after a crash a checkpoint is there and right, or it is not there. The names of those that cannot be
read are forgotten; that costs time, never correctness.

Opening the folder reads the beginnings of its files only; a checkpoint's numbers are read when a prompt needs them.
What has not been used for longest goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hybridlm.atomic import atomic_write, clean_stale
from hybridlm.errors import HybridLMError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["DiskTier", "Stored"]

_MAGIC, _VERSION = b"hlmprefx", 1
_PREFIX = struct.Struct("<8sIQ32s")  # magic, version, bytes of the head, its sha256
_MAX_HEAD = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A checkpoint on the disk."""

    tokens: np.ndarray  # int32
    path: Path
    own: int  # bytes of its own part
    digest: str  # sha256 of that
    blocks: tuple[tuple[str, int], ...]  # names and bytes, in order
    nbytes: int  # of its file


class DiskTier:
    """Not safe to use from several threads but for `write` and `read`, which touch files alone; `PrefixCache` locks."""

    def __init__(self, folder: str | Path, fingerprint: str, budget: int, block: Callable[[bytes], Any],
                 rebuild: Callable[[list[int], bytes, list[Any]], Any],
                 device: contextlib.AbstractContextManager[Any] | None = None) -> None:
        """
        Args:
            fingerprint: says to which model the checkpoints belong.
            budget: bytes of files.
            block, rebuild: `block(data)` makes a shared block, `rebuild(tokens, own, blocks)` a checkpoint; either
                raises ValueError for data that cannot be one.
            device: held while a checkpoint is copied from where it is, for devices on which not everything may happen
                at the same time.

        Raises `HybridLMError` where the folder cannot be used, or another process uses it.
        """
        self.folder, self.fingerprint, self.budget = Path(folder), fingerprint, budget
        self.nbytes = 0
        self._block, self._rebuild, self._device = block, rebuild, device or contextlib.nullcontext()
        self._entries: OrderedDict[Path, Stored] = OrderedDict()  # the one to go first at the front
        self._counts: dict[str, int] = {}  # checkpoints that hold each block
        self._live: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # blocks in memory by name
        self._names: dict[int, tuple[Any, str]] = {}  # and the other way: id -> (weak reference, name)
        try:  # what was said is for its owner alone
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a+b")
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.seek(0)
            owner, mine = self._lock.read(), hashlib.sha256(fingerprint.encode()).hexdigest().encode()
            if owner != mine and len(owner) == len(mine):
                self._lock.close()
                raise HybridLMError(f"{self.folder}: keeps the prefix cache of another model, or of another form of "
                                    "its states; choose another folder")
            if owner != mine:
                self._lock.truncate(0)
                self._lock.write(mine)
                self._lock.flush()
        except BlockingIOError:
            self._lock.close()
            raise HybridLMError(f"{self.folder}: another process keeps its prefix cache there; choose another "
                                "folder") from None
        except OSError as error:
            raise HybridLMError(f"{self.folder}: cannot be used for the prefix cache ({error.strerror}); choose "
                                "another folder") from None

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def __len__(self) -> int:
        return len(self._entries)

    def scan(self) -> list[Stored]:
        """What earlier processes left that is whole by its head; everything else is removed. Used last comes last."""
        found: list[tuple[int, Stored]] = []
        for path in self.folder.glob("*/.*.tmp"):
            clean_stale(path.with_name(path.name[1:].rsplit(".", 2)[0]))
        there = {path.stem: path.stat().st_size for path in self.folder.glob("*/*.page")}
        for path in self.folder.glob("*/*.state"):
            try:
                stored = self._head(path)
                if not all(there.get(name) == size for name, size in stored.blocks):
                    raise ValueError
                found.append((path.stat().st_mtime_ns, stored))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
                _remove(path)
        found.sort(key=lambda pair: pair[0])
        used = {name for _, stored in found for name, _ in stored.blocks}
        for name in there.keys() - used:
            _remove(self._page(name))
        for _, stored in found:
            self._count(stored)
        self._make_room()
        return list(self._entries.values())

    # -- files -------------------------------------------------------------------------------------------------------

    def write(self, checkpoint: Any) -> Stored | None:
        """Put a checkpoint's files there. None where that cannot be (no space): then none is left behind."""
        tokens = np.array(checkpoint.tokens, dtype=np.int32)
        with self._device:
            own = checkpoint.own_parts()
        digest = hashlib.sha256()
        for part in own:
            digest.update(part)
        blocks: list[tuple[str, int]] = []
        try:
            for block in checkpoint.blocks():
                blocks.append(self._write_block(checkpoint, block))
            size = sum(memoryview(part).nbytes for part in own)
            head = json.dumps({"fingerprint": self.fingerprint, "tokens": tokens.tolist(), "own": size,
                               "digest": digest.hexdigest(), "blocks": blocks}, separators=(",", ":")).encode()
            key = hashlib.sha256(self.fingerprint.encode() + tokens.tobytes()).hexdigest()
            path = self.folder / key[:2] / f"{key}.state"
            with _private(path) as file:
                file.write(_PREFIX.pack(_MAGIC, _VERSION, len(head), hashlib.sha256(head).digest()))
                file.write(head)
                for part in own:
                    file.write(part)
            _stamp(path)
        except (OSError, HybridLMError):
            for name, _ in blocks:
                if name not in self._counts:
                    _remove(self._page(name))
            return None
        return Stored(tokens, path, size, digest.hexdigest(), tuple(blocks), _PREFIX.size + len(head) + size)

    def _write_block(self, checkpoint: Any, block: Any) -> tuple[str, int]:
        known = self._names.get(id(block))
        if known is not None and known[0]() is block and self._page(known[1]).exists():
            return known[1], block.nbytes
        with self._device:
            data = checkpoint.block_bytes(block)
        name = hashlib.sha256(data).hexdigest()
        self._remember(name, block)
        if not self._page(name).exists():
            with _private(self._page(name)) as file:
                file.write(data)
        return name, memoryview(data).nbytes

    def read(self, stored: Stored) -> Any:
        """The checkpoint, whole. Raises ValueError or OSError where it is damaged or gone."""
        with stored.path.open("rb") as file:
            file.seek(stored.nbytes - stored.own)
            own = file.read()
        if len(own) != stored.own or hashlib.sha256(own).hexdigest() != stored.digest:
            raise ValueError(stored.path)
        blocks = []
        for name, size in stored.blocks:
            block = self._live.get(name)
            if block is None:
                data = self._page(name).read_bytes()
                if len(data) != size or hashlib.sha256(data).hexdigest() != name:
                    _remove(self._page(name))  # or it would be taken for there when it is to be written again
                    raise ValueError(name)
                block = self._block(data)
                self._remember(name, block)
            blocks.append(block)
        return self._rebuild(stored.tokens.tolist(), own, blocks)

    def _head(self, path: Path) -> Stored:
        """What a file says of itself; ValueError and the like for any other file."""
        with path.open("rb") as file:
            magic, version, size, digest = _PREFIX.unpack(file.read(_PREFIX.size))
            if magic != _MAGIC or version != _VERSION or size > _MAX_HEAD:
                raise ValueError(path)
            head = file.read(size)
            nbytes = file.seek(0, os.SEEK_END)
        if hashlib.sha256(head).digest() != digest:
            raise ValueError(path)
        said = json.loads(head)
        if said["fingerprint"] != self.fingerprint or nbytes != _PREFIX.size + size + said["own"]:
            raise ValueError(path)
        return Stored(np.array(said["tokens"], dtype=np.int32), path, said["own"], said["digest"],
                      tuple((str(name), int(n)) for name, n in said["blocks"]), nbytes)

    def _page(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.page"

    def _remember(self, name: str, block: Any) -> None:
        """That a block in memory is the file of this name, for as long as it is in memory."""
        key = id(block)
        self._names[key] = (weakref.ref(block, lambda _: self._names.pop(key, None)), name)
        self._live[name] = block

    # -- the budget --------------------------------------------------------------------------------------------------

    def add(self, stored: Stored) -> list[Stored]:
        """Count what `write` gave; returns what must go for it (perhaps itself), for `drop`."""
        old = self._entries.pop(stored.path, None)
        self._count(stored)
        if old is not None:  # the same file, written anew; counted down last, so that what both hold stays
            self._release(old)
        return self._make_room()

    def use(self, stored: Stored) -> None:
        """It was of use: others go before it."""
        if stored.path in self._entries:
            self._entries.move_to_end(stored.path)
            _stamp(stored.path)

    def drop(self, stored: Stored) -> None:
        """Remove a checkpoint's files."""
        if self._entries.pop(stored.path, None) is not None:
            self._release(stored)
            _remove(stored.path)

    def _make_room(self) -> list[Stored]:
        gone: list[Stored] = []
        while self.nbytes > self.budget and self._entries:
            stored = next(iter(self._entries.values()))
            self.drop(stored)
            gone.append(stored)
        return gone

    def _count(self, stored: Stored) -> None:
        self._entries[stored.path] = stored
        self.nbytes += stored.nbytes
        for name, size in stored.blocks:
            held = self._counts.get(name, 0)
            self._counts[name] = held + 1
            self.nbytes += 0 if held else size

    def _release(self, stored: Stored) -> None:
        """Out of the count; blocks that nobody else holds go."""
        self.nbytes -= stored.nbytes
        for name, size in stored.blocks:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]
                self.nbytes -= size
                _remove(self._page(name))


@contextlib.contextmanager
def _private(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole, for its owner alone."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with atomic_write(path) as file:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), 0o600)
        yield file


def _stamp(path: Path) -> None:
    """Note that it is used now, by a clock finer than the file system's own."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(path, ns=(now, now))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
