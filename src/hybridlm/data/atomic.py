"""Files that are either whole or not there: write aside, flush to the disk, rename.

`rename` replaces a file in one step on every system we run on. The folder is flushed too, so that after a power cut the
name does not point to nothing. A full disk removes what was begun and says so in one sentence.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hybridlm.errors import DataError

__all__ = ["flush_files", "flush_folder", "write_file"]


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Put `data` at `path`, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise DataError(f"{path}: cannot be written ({error.strerror}); what was saved before is untouched, "
                        "make room and run the same command again") from None


def flush_files(folder: Path) -> None:
    """Make the files of a folder, and their names, last; before the folder is renamed to what counts."""
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Make renames within a folder last through a power cut, where the system can."""
    with suppress(OSError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
