"""The Hugging Face hub: what a repository holds, and its files fetched so that nothing arrives twice.

`huggingface_hub` knows the protocol (addresses, tokens, redirects, errors). Where the bytes go is decided here: its own
download starts a file again from nothing when the process was killed, which at 15 GB is not what anybody wants. So
each file grows as `NAME.part`, is continued with a Range request, is checked against the hash that the hub states, and
only then gets its name. All of one fetch is of one commit.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hybridlm.errors import HybridLMError, ModelNotFoundError
from hybridlm.store.cache import Report

__all__ = ["RemoteFile", "Repository", "fetch", "look_up"]

_TRIES = 5  # in a row without one new byte
_TIMEOUT = 20.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `digest` is sha256 for large files, git's sha1 for small ones."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """One commit of a repository."""

    id: str
    commit: str
    files: dict[str, RemoteFile]


def look_up(repo_id: str, revision: str | None) -> Repository:
    """Ask the hub. Raises `ModelNotFoundError`, saying why, when it knows no such thing or cannot be reached."""
    from huggingface_hub import HfApi

    with plain_errors(repo_id, revision):
        info = HfApi(endpoint=endpoint()).model_info(repo_id, revision=revision, files_metadata=True,
                                                      timeout=_TIMEOUT)
    files = {}
    for s in info.siblings or []:
        digest = s.lfs.sha256 if s.lfs else s.blob_id
        if digest and _is_inside(s.rfilename):
            files[s.rfilename] = RemoteFile(s.rfilename, s.size or 0, digest)
    return Repository(repo_id, str(info.sha), files)


def fetch(repository: Repository, names: list[str], folder: Path, report: Report) -> None:
    """Bring files into `folder`; those already there stay. Raises `ModelNotFoundError` when the hub does not deliver;
    what has arrived is kept for the next time."""
    files = [repository.files[name] for name in names]
    total = sum(f.size for f in files)
    done = 0
    for file in files:
        target = folder / file.name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch_one(repository, file, target, lambda n, before=done: report("downloading", before + n, total))
        done += file.size
        report("downloading", done, total)


def missing_bytes(repository: Repository, names: list[str], folder: Path) -> int:
    """How much of these files `fetch` would still transfer."""
    missing = 0
    for file in (repository.files[name] for name in names):
        part = _part(folder / file.name)
        have = file.size if (folder / file.name).is_file() else part.stat().st_size if part.is_file() else 0
        missing += max(0, file.size - have)
    return missing


class _Sink:
    """A `.part` file that is hashed while it grows."""

    def __init__(self, handle: BinaryIO, file: RemoteFile, moved: Any) -> None:
        self.handle, self.file, self.moved = handle, file, moved
        self.size = 0
        self._start()
        handle.seek(0)
        while block := handle.read(1 << 20):
            self._take(block)

    def _start(self) -> None:
        # git names a small file by the sha1 of a header and the content
        git = len(self.file.digest) == 40
        self.digest = hashlib.sha1(b"blob %d\0" % self.file.size) if git else hashlib.sha256()
        self.size = 0

    def _take(self, block: bytes) -> None:
        self.digest.update(block)
        self.size += len(block)
        self.moved(min(self.size, self.file.size))

    @property
    def is_right(self) -> bool:
        return self.size == self.file.size and self.digest.hexdigest() == self.file.digest

    def write(self, block: bytes) -> None:
        try:
            self.handle.write(block)
        except OSError as error:
            raise HybridLMError(f"{self.handle.name}: cannot be written ({error.strerror}); free some disk or set "
                                "HYBRIDLM_HOME to a folder on another one, then run the same command again") from None
        self._take(block)

    def restart(self) -> None:
        self.handle.seek(0)
        self.handle.truncate()
        self._start()


def _fetch_one(repository: Repository, file: RemoteFile, target: Path, moved: Any) -> None:
    part = _part(target)
    with part.open("a+b") as handle:
        sink = _Sink(handle, file, moved)
        for _ in range(2):
            _transfer(repository, file, sink)
            if sink.is_right:
                break
            sink.restart()
        else:
            raise ModelNotFoundError(f"{repository.id}: {file.name} arrives damaged (its hash is not the one that the "
                                     "hub states); try again later or report it to the repository's owner")
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(target)


def _transfer(repository: Repository, file: RemoteFile, sink: _Sink) -> None:
    """Until all bytes are there, however often the connection breaks."""
    failures = 0
    while sink.size < file.size:
        before = sink.size
        try:
            with plain_errors(repository.id, repository.commit):
                _stream(repository, file, sink)
        except _Unreachable as error:
            failures = 0 if sink.size > before else failures + 1
            if failures == _TRIES:
                raise ModelNotFoundError(f"{error}; run the same command again later, what has arrived is "
                                         "kept") from None
            time.sleep(min(0.2 * 2**failures, 5))


def _stream(repository: Repository, file: RemoteFile, sink: _Sink) -> None:
    """One answer of the hub, or of the store it redirects to, from where the file ends."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repository.id, file.name, revision=repository.commit, endpoint=endpoint())
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={sink.size}-"}
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206 and sink.size:  # the whole file, although the rest was asked for
            sink.restart()
        for block in answer.iter_bytes():
            sink.write(block)
            if sink.size > file.size:
                return


class _Unreachable(ModelNotFoundError):
    """The network or the hub failed in a way that may pass."""


@contextmanager
def plain_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Errors of `huggingface_hub` and its HTTP library as one sentence."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    hub = endpoint()
    try:
        yield
    except GatedRepoError:
        raise ModelNotFoundError(f"{repo_id}: its owner lets in only who has agreed to terms; do that at "
                                 f"{hub}/{repo_id} and log in with `hf auth login` or HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(f"{repo_id}: neither a file or folder here nor a repository on {hub} that you may "
                                 "see; check the name, or log in with `hf auth login` or HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"{repo_id}: has no branch, tag or commit {revision!r} on {hub}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise ModelNotFoundError(f"{repo_id}: {hub} refuses access ({status}); log in with `hf auth login` or "
                                     "HF_TOKEN") from None
        if status == 404:
            raise ModelNotFoundError(f"{repo_id}: {hub} no longer has a file that it lists; try again") from None
        raise _Unreachable(f"{repo_id}: {hub} answers with error {status}; it may be overloaded") from None
    except Exception as error:  # each HTTP library has its own family of them
        library = type(error).__module__.split(".")[0].rstrip("2")
        if library not in ("httpx", "httpcore", "requests", "urllib3") and not isinstance(error, ConnectionError):
            raise
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        raise _Unreachable(f"{repo_id}: {hub} cannot be reached ({reason})") from None


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _is_inside(name: str) -> bool:
    """Whether a file name from outside stays below the folder it is written to."""
    return not set(name) & set(":\\\0") and not {"", ".", ".."} & set(name.split("/"))
