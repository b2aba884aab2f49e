"""The folder that holds what was fetched and converted: where it is, one process at a time, room on the disk.

    HYBRIDLM_HOME, or the platform's cache folder + "hybridlm"
        hub/OWNER--NAME/refs/REVISION[.TYPE].json   which file a name has come to mean
        hub/OWNER--NAME/NAME-TYPE-KEY.gguf          converted; KEY is of the content of what it was made from
        hub/OWNER--NAME/files/KEY/NAME.gguf         a GGUF file of the repository
        hub/OWNER--NAME/downloads/KEY/              weights as downloaded, kept for other types
        folders/NAME-HASH/NAME-TYPE-KEY.gguf        converted from a local folder; HASH is of its path
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridlm import atomic
from hybridlm.errors import HybridLMError

__all__ = ["Report", "fingerprint", "home", "locked", "require_space"]

# report(stage, done, total): how far a stage is, in bytes; total 0 for a stage without a length.
Report = Callable[[str, int, int], None]

_HEAD_BYTES = 1 << 20
_HASHED = (".json", ".jinja", ".txt", ".model")


def home() -> Path:
    """The cache folder; it need not exist."""
    if chosen := os.environ.get("HYBRIDLM_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "hybridlm" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hybridlm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridlm"


@contextmanager
def locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock file `path`; another process that wants it waits. It goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            report("waiting for another process that prepares the same model", 0, 0)
            lock.acquire()
    except OSError as error:
        raise HybridLMError(f"{path.parent}: cannot be written ({error.strerror}); set HYBRIDLM_HOME to a folder that "
                            "can hold models") from None
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, nbytes: int, what: str) -> None:
    """Raise when the disk of `folder` has no room for `nbytes`, which are for `what`."""
    atomic.require_space(folder, nbytes, what, "set HYBRIDLM_HOME to a folder on a larger disk")


def fingerprint(folder: Path, names: list[str]) -> str:
    """A key of the content of files, 16 hex digits: small text files by their whole content, weights by size, time of
    change and first megabyte, because reading 15 GB to find a name would take longer than converting them."""
    digest = hashlib.sha256()
    for name in sorted(names):
        path = folder / name
        stat = path.stat()
        digest.update(f"{name} {stat.st_size} ".encode())
        with path.open("rb") as file:
            if name.endswith(_HASHED):
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(f"{stat.st_mtime_ns} ".encode() + file.read(_HEAD_BYTES))
    return digest.hexdigest()[:16]
