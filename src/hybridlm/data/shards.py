"""Text to token shards, on all cores, atomically and resumably.

Documents are read on one thread and encoded in batches: by a process a core where there are several, else by the
tokenizers library's threads.
A shard is written under a temporary name, flushed to disk, renamed, and then entered in `progress.json` together with
the place in the source where it ends. A killed run starts again at the last shard entered and, the source being the
same stream each time, leaves the very files that an undisturbed run leaves. `manifest.json` comes last.

Which documents are held out is decided by the sha256 of their text, so copies of one text never fall on both sides,
and adding files moves none of those already there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.atomic import write_file
from hybridlm.data.sources import Document, Source
from hybridlm.data.tokens import MANIFEST, VERSION, TokenFolder, read_manifest, sha256_of
from hybridlm.data.workers import encode_all
from hybridlm.errors import DataError
from hybridlm.text import Tokenizer

__all__ = ["held_out", "tokenize"]

PROGRESS = "progress.json"
_BATCH_CHARACTERS = 1 << 22
_LARGE = 16 << 20  # bytes of source from which on processes are worth their start
_SMALL = 64 << 20  # bytes of source below which a first pass makes sure that something is held out

Batch = list[tuple[int, int, Document]]
Progress = Callable[[int, int], None]  # (documents so far, tokens so far)


def tokenize(source: Source, tokenizer: Tokenizer, out: str | Path, *, val_fraction: float = 0.0,
             shard_tokens: int = 1 << 26, progress: Progress | None = None, workers: int | None = None) -> TokenFolder:
    """Tokenise a source into the folder `out` and open it; at once when that is already done for the same source.

    Args:
        val_fraction: the share of documents held out. Of two documents or more, at least one is, and at least one not.
        shard_tokens: a shard is closed once it holds so many; the unit of resuming.
        workers: processes that encode; None is one a core for a source of some size. Files do not depend on it.

    Raises `DataError` when the source has no text, or `out` holds tokens of another source or tokenizer.
    """
    out = Path(out)
    if tokenizer.eos is None:
        raise DataError("the tokenizer names no end-of-text token, which separates documents; "
                        "add eos_token to its tokenizer_config.json")
    job = {"version": VERSION, "source": source.fingerprint, "tokenizer": tokenizer.fingerprint, "eos": tokenizer.eos,
           "val_fraction": val_fraction, "shard_tokens": shard_tokens,
           "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"}
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        changed = [key for key, value in job.items() if manifest.get(key) != value]
        if changed:
            raise DataError(f"{out}: holds tokens of another run ({', '.join(changed)} differ); "
                            "give another out= or delete that folder")
        return TokenFolder.open(out)
    out.mkdir(parents=True, exist_ok=True)
    state = _resume(out, job, source)
    writer = _Writer(out, state, tokenizer.vocab_size)
    # A file may hold many documents and labels appear as they come: both live in the state that a shard commits.
    if workers is None:
        cores = os.cpu_count() or 1  # on a few, the library's own threads leave next to nothing idle
        workers = cores if cores >= 4 and source.nbytes >= _LARGE else 1
    batches = ((batch, [d.text for _, _, d in batch])
               for batch in _ahead(_batches(source, state["file"], state["document"])))
    for batch, encoded in encode_all(tokenizer, batches, state["dtype"], workers):
        for (file, number, document), (tokens, nbytes, digest) in zip(batch, encoded, strict=True):
            writer.add(document.label, tokens, nbytes, digest)
            state["file"], state["document"] = file, number + 1
        if progress:
            progress(state["documents"], writer.total)
        if writer.pending >= shard_tokens:
            writer.commit()
    writer.commit()
    if not state["documents"]:
        raise DataError(f"{source.path}: no text in {len(source.files)} file(s)")
    manifest = {k: v for k, v in state.items() if k not in ("file", "document", "held_out_below")}
    manifest["skipped"] = dict(source.skipped)
    write_file(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    (out / PROGRESS).unlink(missing_ok=True)
    return TokenFolder.open(out, verify=False)


def _resume(out: Path, job: dict[str, Any], source: Source) -> dict[str, Any]:
    """The state an interrupted run of the same job left, or a new one."""
    try:
        state: dict[str, Any] = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        if all(state.get(key) == value for key, value in job.items()):
            return state
    except (FileNotFoundError, ValueError):
        pass
    return {**job, "held_out_below": _threshold(source, job["val_fraction"]), "file": 0, "document": 0, "documents": 0,
            "bytes": 0, "content": "", "labels": [], "shards": []}


def held_out(source: Source, fraction: float) -> Callable[[str], bool]:
    """Whether a text falls on the side of validation, as `tokenize` decides it."""
    threshold = _threshold(source, fraction)
    return lambda text: _hash(text) < threshold


def _threshold(source: Source, fraction: float) -> int:
    """Documents whose hash is below this are held out."""
    threshold = int(fraction * 2**64)
    if fraction > 0 and source.nbytes <= _SMALL:
        hashes = sorted({_hash(d.text) for _, _, d in source.documents()})
        if len(hashes) >= 2:
            threshold = min(max(threshold, hashes[0] + 1), hashes[-1])
        else:
            threshold = 0
    return threshold


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _batches(source: Source, file: int, skip: int) -> Iterator[Batch]:
    batch: Batch = []
    held = 0
    for item in source.documents(file, skip):
        batch.append(item)
        held += len(item[2].text)
        if held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _ahead(items: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """The same items, read on a thread that keeps a few ready; its errors are raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    left = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not left.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put(item)
                if left.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()


def _npy(table: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


class _Writer:
    """Collects both splits and writes them as a pair of shards."""

    def __init__(self, out: Path, state: dict[str, Any], vocab: int) -> None:
        self.out, self.state, self.vocab = out, state, vocab
        self.total = sum(s["tokens"] for s in state["shards"])
        self.number = 1 + max((s["number"] for s in state["shards"]), default=-1)
        self._clear()

    def _clear(self) -> None:
        self.pending = 0
        self.parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        self.tables: dict[str, list[tuple[int, int, int]]] = {"train": [], "val": []}
        self.sizes = {"train": 0, "val": 0}

    def add(self, label: str, tokens: np.ndarray, nbytes: int, digest: bytes) -> None:
        state = self.state
        if label not in state["labels"]:
            state["labels"].append(label)
        split = "val" if int.from_bytes(digest[:8], "big") < state["held_out_below"] else "train"
        self.parts[split].append(tokens)
        self.tables[split].append((self.sizes[split], nbytes, state["labels"].index(label)))
        self.sizes[split] += len(tokens)
        self.pending += len(tokens)
        self.total += len(tokens)
        state["documents"] += 1
        state["bytes"] += nbytes
        state["content"] = hashlib.sha256(state["content"].encode() + digest).hexdigest()

    def commit(self) -> None:
        for split, parts in self.parts.items():
            if not parts:
                continue
            name = f"{split}-{self.number:05d}"
            tokens = np.concatenate(parts)
            table = np.array(self.tables[split], dtype=np.int64)
            write_file(self.out / f"{name}.bin", tokens.astype(tokens.dtype.newbyteorder("<")).data)
            write_file(self.out / f"{name}.docs.npy", _npy(table))
            files = {f: sha256_of(self.out / f) for f in (f"{name}.bin", f"{name}.docs.npy")}
            self.state["shards"].append({"split": split, "number": self.number, "tokens": len(tokens),
                                         "documents": len(table), "bytes": int(table[:, 1].sum()), "files": files})
        write_file(self.out / PROGRESS, json.dumps(self.state).encode())
        self.number += 1
        self._clear()
