"""Files that appear under their final name whole or not at all.

Bytes go to a temporary neighbour (".NAME.xxxxxxxx.tmp"), are flushed to the disk, and the neighbour is renamed. A
killed process leaves its neighbour behind; the next writer of the same name removes it. A lock tells the neighbours of
dead writers from those of living ones: the system drops it with the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from hybridlm.errors import HybridLMError

try:
    import fcntl
except ImportError:  # Windows, where a file that someone has open cannot be removed at all
    fcntl = None  # type: ignore[assignment]

__all__ = ["DiskFullError", "atomic_folder", "atomic_write", "atomic_write_all", "clean_stale", "flush_files",
           "flush_folder", "require_space", "write_file"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(HybridLMError):
    """The place that a file was to be written to has no room for it."""


@contextlib.contextmanager
def atomic_write(path: str | Path, *, size: int = 0) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only when the block ends well.

    `size`: bytes that will be written, if known; too little space is then refused before the work. Raises
    `DiskFullError` when the disk fills up meanwhile. Any exception, Ctrl-C included, leaves `path` as it was.
    """
    with atomic_write_all([path], size=size) as (file,):
        yield file


@contextlib.contextmanager
def atomic_write_all(
    paths: Sequence[str | Path], *, size: int = 0, replacing: Sequence[Path] = ()
) -> Iterator[list[BinaryIO]]:
    """The same for files that belong together: none is renamed before all are on the disk.

    `replacing`: files that must not stand beside the new ones; they are removed just before the renames.
    """
    targets = [Path(p) for p in paths]
    files: list[BinaryIO] = []
    try:
        try:
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                clean_stale(target)
            require_space(targets[0].parent, size)
            for target in targets:
                files.append(_temporary(target))
        except OSError as error:
            if error.errno not in _FULL:
                raise HybridLMError(f"{targets[0]}: cannot be written ({error.strerror})") from None
            raise
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for path in replacing:
            path.unlink(missing_ok=True)
        for file, target in zip(files, targets, strict=True):
            if fcntl is None:
                file.close()
            Path(file.name).replace(target)
        for folder in {target.parent for target in targets}:
            flush_folder(folder)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror)
        raise DiskFullError(f"{targets[0]}: {reason}; nothing was written; free space or choose another "
                            "place") from None
    finally:
        for file in files:
            with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses again
                file.close()
            with contextlib.suppress(OSError):
                Path(file.name).unlink()


def clean_stale(target: Path) -> None:
    """Remove what killed writers of `target` left behind."""
    for path in target.parent.glob(f".{_escape(target.name)}.????????.tmp"):
        with contextlib.suppress(OSError):
            if fcntl is None:
                path.unlink()
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def require_space(folder: Path, size: int, what: str = "", way_out: str = "choose another place") -> None:
    """Raise `DiskFullError` when `folder` clearly has no room for `size` more bytes, which are for `what`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        purpose = f" for {what}" if what else ""
        raise DiskFullError(f"{folder}: {size / 1e9:.2f} GB are needed{purpose} and {free / 1e9:.2f} GB are free; free "
                            f"space or {way_out}")


def _temporary(target: Path) -> BinaryIO:
    """A locked new file beside `target`."""
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        file = path.open("xb")
        if fcntl is None:
            return file
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # else a cleaner came between the two lines above
            return file
        file.close()


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Put `data` at `path`, whole or not at all. Raises `HybridLMError` when that cannot be done."""
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise HybridLMError(f"{path}: cannot be written ({error.strerror}); what was there before is "
                            "untouched") from None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder aside to fill, which takes the place of `path` when the block ends well; one writer at a time.

    What killed writers left is removed. `OSError` is the caller's to word.
    """
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        flush_files(aside)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
        flush_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def flush_files(folder: Path) -> None:
    """Make the files of a folder, and their names, last; before the folder is renamed to what counts."""
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Make renames within a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
