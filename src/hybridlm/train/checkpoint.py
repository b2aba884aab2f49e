"""Checkpoints over PyTorch's distributed format: written in the background, by any number of ranks, read by any other.

    OUT/checkpoints/step-00000400/
        __0_0.distcp, __1_0.distcp, ...   what each rank wrote: float32 weights and the optimiser's moments
        .metadata                         which piece of which tensor lies where (PyTorch's)
        state.json                        step, clock, recipe: plain data
        manifest.json                     size and sha256 of each file; written last, so without it there is none

`save` copies the state to the host and returns; a thread writes it into a folder aside, hashes it, and the first rank
renames the folder once every rank's part is on the disk. Loading goes from the newest to the oldest, checks every
byte, and takes the first that is whole; the ranks share the checking. Tensors are named `model.NAME` and
`optimizer.NAME.KEY`, whole in shape, so that neither the number of ranks nor the kind of device matters.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from hybridlm.atomic import flush_files, flush_folder, write_file
from hybridlm.data.tokens import sha256_of
from hybridlm.errors import DataError, HybridLMError
from hybridlm.train.checksum import ReplicaError, Replicas
from hybridlm.train.state import local, model_tensors, optimizer_tensors, optimizers, parameters, pin, room_for, share

__all__ = ["CheckpointError", "Checkpoints", "fault_of", "find", "read_weights"]

MANIFEST = "manifest.json"

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group


class CheckpointError(DataError):
    """A checkpoint that could not be written; those before it are as they were."""


class Ranks(Protocol):
    """What is needed of `hybridlm.train.parallel.Parallel`."""

    rank: int
    world: int


class Checkpoints:
    """The checkpoints of one run, as one rank sees them. Every method is called by all ranks together.

    Args:
        keep: so many of the newest stay; older ones go, unless their step is a multiple of `permanent_every`.
        tell: called as tell(kind, **fields) for the log of events.
        disturb: called as disturb(step, folder) while a checkpoint is being written, where faults are injected.
    """

    def __init__(self, folder: Path, parallel: Ranks, *, keep: int, permanent_every: int = 0,
                 tell: Callable[..., None] = lambda kind, **fields: None,
                 disturb: Callable[[int, Path], None] = lambda step, folder: None) -> None:
        self.folder, self.keep, self.permanent_every = folder, keep, permanent_every
        self.rank, self.world = parallel.rank, parallel.world
        self._tell, self._disturb = tell, disturb
        # A group of its own: the thread's messages must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if self.world > 1 else None
        self._replicas = Replicas(self._group)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._host: dict[str, Tensor] = {}
        self._failed = 0  # saves in a row

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, step: int, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], state: dict[str, Any], *,
             wait: bool = False) -> None:
        """Save the state after `step`; with `wait`, return once it is on the disk.

        state: plain data that goes with it.

        A save that failed is told and tried again at the next one; the second failure in a row, or one that is waited
        for, raises `CheckpointError`. Raises `ReplicaError` when replicas no longer hold the same bits.
        """
        began = time.monotonic()
        self._tell("checkpoint_begin", step=step)
        self._settle(last=False)
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
        try:
            self._replicas.check(tensors, f"checkpoint of step {step}")
        except ReplicaError as error:
            self._tell("diverged", step=step, ranks=list(error.ranks))
            raise
        self._copy(tensors)
        self._pending = self._writer.submit(self._write, step, dict(state), time.monotonic())
        if wait:
            self.finish()
        self._tell("checkpoint_stall", step=step, seconds=round(time.monotonic() - began, 4))

    def finish(self) -> None:
        """Wait for what is being written. Raises `CheckpointError` when it failed."""
        self._settle(last=True)

    def _settle(self, *, last: bool) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._failed = 0
        except CheckpointError as error:
            self._failed += 1
            self._tell("checkpoint_failed", error=str(error))
            if last or self._failed > 1:
                raise

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """This rank's share of the state, copied to host memory that is used again for the next save."""
        before, self._host, on_gpu = self._host, {}, False
        for name, tensor in share(tensors, self.rank, self.world).items():
            source = tensor.detach()
            piece, host = local(source), before.get(name)
            if host is None:
                host = source.cpu() if piece.is_cuda else source.clone()
                if piece.is_cuda:
                    pin(local(host))
            else:
                local(host).copy_(piece, non_blocking=True)
            self._host[name] = host
            on_gpu |= piece.is_cuda
        if on_gpu:
            torch.cuda.synchronize()

    def _write(self, step: int, state: dict[str, Any], began: float) -> None:
        final, aside = self.folder / _name(step), self.folder / f".{_name(step)}.tmp"
        fault = self._everywhere(partial(self._prepare, aside) if self.rank == 0 else _nothing)
        if not fault:
            fault = self._everywhere(partial(self._disturb, step, aside))
        if not fault:
            try:
                dcp.save(dict(self._host), storage_writer=dcp.FileSystemWriter(aside, thread_count=1),
                         process_group=self._group, no_dist=self._group is None)
            except (CheckpointException, OSError, RuntimeError) as error:
                fault = _reason(error)
            fault = self._everywhere(partial(_raise, fault))
        if not fault:
            parts = self._gather({f.name: _entry(f) for f in aside.glob(f"__{self.rank}_*")})
            fault = self._everywhere(partial(self._commit, aside, final, state, parts) if self.rank == 0 else _nothing)
        if fault:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(f"{final}: the checkpoint cannot be written ({fault}); the ones before it are "
                                  "untouched, make room and run the same command again")
        self._tell("checkpoint_commit", step=step, seconds=round(time.monotonic() - began, 3))

    def _prepare(self, aside: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for rest in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(rest)
        aside.mkdir()

    def _commit(self, aside: Path, final: Path, state: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {name: entry for part in parts for name, entry in part.items()}
        absent = [name for name in files if not (aside / name).exists()]
        if absent:
            raise OSError(f"{absent[0]} was written by another machine and is not seen here: out= must be a folder "
                          "that all machines share")
        flush_files(aside)
        files |= {name: _entry(aside / name) for name in ("state.json", ".metadata")}
        manifest = {"world": self.world, "torch": torch.__version__, "files": files}
        write_file(aside / MANIFEST, json.dumps(manifest, indent=1).encode())
        if final.exists():  # a damaged one of the same step
            _remove(final)
        aside.rename(final)
        flush_folder(self.folder)
        passing = [p for p in find(self.folder) if not self.permanent_every or _step(p) % self.permanent_every]
        for old in passing[self.keep:]:
            with suppress(OSError):
                _remove(old)

    # -- loading -------------------------------------------------------------------------------------------------

    def load_newest(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], warn: Callable[[str], None],
                    check: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any] | None:
        """Fill model and optimiser from the newest whole checkpoint; its `state`, or None when there is none at all.

        `check` sees the state before anything is filled, and may refuse it by raising.
        Damaged ones are told to `warn` (by the first rank) and left in place. Raises `DataError` when all are damaged.
        """
        found = self._gather([str(p) for p in find(self.folder)] if self.rank == 0 else [])[0]
        for path in map(Path, found):
            faults = [f for f in self._gather(fault_of(path, self.rank, self.world)) if f]
            if faults:
                self._tell("checkpoint_damaged", path=path.name, error=faults[0])
                if self.rank == 0:
                    warn(f"{path}: {faults[0]}; falling back to the checkpoint before it")
                continue
            state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
            check(state)
            self._fill(path, model, optimizer)
            return state
        if found:
            raise DataError(f"{self.folder}: all {len(found)} checkpoints are damaged; delete the folder to start over")
        return None

    def load(self, path: str | Path, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """Fill model and optimiser from one checkpoint, or the newest of a run. Raises `DataError`."""
        path = Path(path)
        chosen = path if (path / MANIFEST).exists() else next(iter(find(path / "checkpoints")), path)
        faults = [f for f in self._gather(fault_of(chosen, self.rank, self.world)) if f]
        if faults:
            raise DataError(f"{chosen}: {faults[0]}")
        self._fill(chosen, model, optimizer)

    def _fill(self, path: Path, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        reader = dcp.FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        target = model_tensors(model)
        missing = sorted(set(target) ^ {n for n in stored if n.startswith("model.")})
        if missing:
            raise DataError(f"{path}: {missing[0].removeprefix('model.')} is not in both the checkpoint and the model; "
                            "give the recipe it was made with, or another out=")
        states = [room_for(o, model, stored) for o in optimizers(optimizer)]
        for named in states:
            target |= {f"optimizer.{n}.{k}": t for n, entries in named.items() for k, t in entries.items()}
        with torch.no_grad():
            dcp.load(target, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        names = {id(p): n for n, p in parameters(model)}
        for one, named in zip(optimizers(optimizer), states, strict=True):
            order = [names[id(p)] for group in one.param_groups for p in group["params"]]
            one.load_state_dict({"state": {i: named[n] for i, n in enumerate(order) if n in named},
                                 "param_groups": one.state_dict()["param_groups"]})

    # -- the ranks together --------------------------------------------------------------------------------------

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _everywhere(self, action: Callable[[], None]) -> str:
        """Do something on every rank; what went wrong first, or "", the same answer for all."""
        try:
            action()
            fault = ""
        except (OSError, HybridLMError) as error:
            fault = _reason(error)
        return next((f for f in self._gather(fault) if f), "")


def find(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first, whole or not."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by their released names, whole, on the CPU, in any process.

    path: a checkpoint, a folder of checkpoints or a run, of which the newest good one is taken. Raises `DataError`.
    """
    path = Path(path)
    inner = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [path] if (path / ".metadata").exists() or (path / MANIFEST).exists() else find(inner)
    if not found:
        raise DataError(f"{path}: no checkpoint; give a run's folder or one of its checkpoints/step-*")
    faults = []
    for one in found:
        fault = fault_of(one)
        if fault:
            faults.append(f"{one}: {fault}")
            continue
        reader = dcp.FileSystemReader(one)
        weights = {n: torch.empty(m.size, dtype=m.properties.dtype)
                   for n, m in reader.read_metadata().state_dict_metadata.items()
                   if n.startswith("model.") and isinstance(m, TensorStorageMetadata)}
        dcp.load(weights, storage_reader=reader, no_dist=True)
        return {n.removeprefix("model."): t for n, t in weights.items()}
    raise DataError(faults[0])


def fault_of(path: Path, rank: int = 0, world: int = 1) -> str:
    """What is wrong with a checkpoint, or ""; the files' bytes are shared out over the ranks."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for number, (name, entry) in enumerate(sorted(files.items())):
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if number % world == rank and sha256_of(path / name) != entry["sha256"]:
                return f"{name} is damaged (sha256 differs)"
        missing = {".metadata", "state.json"} - set(files)
        return f"{min(missing)} is not in its manifest" if missing else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error})"


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a half-deleted one is never taken for one."""
    aside = path.with_name(f".{path.name}.old.tmp")
    path.rename(aside)
    shutil.rmtree(aside)


def _nothing() -> None:
    pass


def _raise(fault: str) -> None:
    if fault:
        raise OSError(fault)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, from within what PyTorch wraps around it."""
    if isinstance(error, CheckpointException):
        return _reason(next(iter(error.failures.values()))[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).split("\n")[0]
