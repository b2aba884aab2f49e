"""Faults on purpose: what a run must survive, at random moments, from a seeded plan.

The launcher injects what comes from outside a rank (a process killed or frozen, a whole agent lost, SIGTERM, a damaged
file) and leaves an order for a rank to do to itself what comes from within (a flipped bit of a parameter, a disk that
is full while a checkpoint is written). Each is told as the event `fault`. A plan is a file of JSON, so that a run that
was ended by SIGTERM goes on with it:

    {"began": 1700000000.0, "faults": [{"at": 31.5, "kind": "kill", "pick": 0.37, "done": false}, ...]}

`at` counts seconds from `began`, which the launcher sets at the first step; `pick`, 0 to 1, chooses whom it hits. A
batch that gives no number belongs to a step rather than to a moment, as bad data does: HYBRIDLM_BAD_BATCHES="40,97".
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybridlm.atomic import write_file
from hybridlm.train.events import Events
from hybridlm.train.state import local
from hybridlm.train.watchdog import FOLDER, Watch

__all__ = ["BAD_BATCHES", "KILLING", "KINDS", "Fault", "Injector", "Orders", "make_plan", "read_plan", "write_plan"]

KILLING = ("kill", "freeze", "agent")  # a process is lost, or as good as
WITHIN = ("flip", "full")
# Kinds by how often, of 20: 65% are processes lost.
KINDS = {"kill": 5, "freeze": 4, "agent": 4, "damage": 2, "nan": 2, "sigterm": 1, "flip": 1, "full": 1}
BAD_BATCHES = "HYBRIDLM_BAD_BATCHES"


@dataclass
class Fault:
    """One fault; due `at` seconds from the plan's begin, or once a `step` is done, where that is given."""

    at: float
    kind: str
    pick: float
    done: bool = False
    step: int = 0


def make_plan(seed: int, *, seconds: float, every: float, kinds: Mapping[str, int] = KINDS) -> list[Fault]:
    """About one fault every `every` seconds; kinds are drawn from a shuffled deck that holds each as often as told."""
    rng = random.Random(seed)
    faults: list[Fault] = []
    deck: list[str] = []
    at = every * rng.uniform(0.3, 0.7)
    while at < seconds:
        if not deck:
            deck = [kind for kind, count in kinds.items() for _ in range(count)]
            rng.shuffle(deck)
        faults.append(Fault(round(at, 2), deck.pop(), round(rng.random(), 4)))
        at += every * rng.uniform(0.75, 1.25)
    return faults


def write_plan(path: Path, faults: Sequence[Fault], began: float = 0.0) -> None:
    write_file(path, json.dumps({"began": began, "faults": [asdict(f) for f in faults]}, indent=1).encode())


def read_plan(path: Path) -> tuple[float, list[Fault]]:
    plan = json.loads(path.read_text(encoding="utf-8"))
    return plan["began"], [Fault(**f) for f in plan["faults"]]


class Injector:
    """The launcher's part; `look` is called all the time and does what is due."""

    def __init__(self, plan: Path, out: Path, beats: Path, events: Events) -> None:
        self.plan, self.out, self.watch, self.events = plan, out, Watch(beats), events
        self.began, self.faults = read_plan(plan)

    def look(self, agents: Mapping[int, int]) -> None:
        ranks = sorted((p for p in self.watch.pulses() if p.rank >= 0), key=lambda p: p.rank)
        if not self.began and any(p.step >= 0 for p in ranks):
            self.began = time.time()
            write_plan(self.plan, self.faults, self.began)
        if not self.began:
            return
        furthest = max((p.step for p in ranks), default=-1)
        for fault in self.faults:
            due = furthest >= fault.step if fault.step else time.time() >= self.began + fault.at
            if fault.done or not due:
                continue
            if not ranks or (fault.kind != "agent" and any(p.step < 0 for p in ranks)):
                return  # between two starts: as soon as there is someone to hit
            fault.done = True
            write_plan(self.plan, self.faults, self.began)
            victim = ranks[int(fault.pick * len(ranks))]
            damaged = damage_newest(self.out / "checkpoints", fault.pick) if fault.kind == "damage" else None
            self.events.write("fault", what=fault.kind, rank=victim.rank, at=fault.at,
                              **({"path": damaged.parent.name} if damaged else {}))
            self._inject(fault, victim.pid, agents)

    def _inject(self, fault: Fault, victim: int, agents: Mapping[int, int]) -> None:
        if fault.kind in WITHIN:
            (self.watch.folder / f"order-{victim}").write_text(f"{fault.kind} {fault.pick}")
            return
        with suppress(ProcessLookupError):
            if fault.kind == "agent":
                os.killpg(sorted(agents)[int(fault.pick * len(agents))], signal.SIGKILL)
            elif fault.kind == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            else:  # a damaged file shows only once it is needed: so a rank dies as well
                os.kill(victim, signal.SIGSTOP if fault.kind == "freeze" else signal.SIGKILL)


def damage_newest(folder: Path, pick: float) -> Path | None:
    """Flip a bit in a shard of the newest checkpoint; the file."""
    found = sorted(p for p in folder.glob("step-*") if p.is_dir())
    shards = sorted(found[-1].glob("*.distcp")) if found else []
    if not shards:
        return None
    file = shards[int(pick * len(shards))]
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 16]))
    return file


class Orders:
    """A rank's part: the trainer calls `at` at its hook points, where an order from the launcher is carried out.

    Phases: "step", before the step after `step`; "save", on the thread that writes a checkpoint.
    """

    def __init__(self, model: nn.Module, folder: Path, events: Events, rank: int, bad_batches: Collection[int]) -> None:
        self.model, self.events, self.rank, self.bad_batches = model, events, rank, bad_batches
        self.path = folder / f"order-{os.getpid()}"
        self._full = False

    @classmethod
    def from_environment(cls, model: nn.Module, events: Events) -> Orders | None:
        """None without a launcher."""
        folder = os.environ.get(FOLDER)
        bad = [int(s) for s in os.environ.get(BAD_BATCHES, "").split(",") if s]
        return cls(model, Path(folder), events, int(os.environ.get("RANK", "0")), bad) if folder else None

    def at(self, step: int, phase: str, **more: Any) -> None:
        if phase == "save" and self._full:
            self._full = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if phase != "step":
            return
        if step in self.bad_batches and self.rank == 0:
            if step >= self.events.furthest:
                self.events.write("fault", what="nan", rank=0, step=step)
            self._no_number()
        if not self.path.exists():
            return
        kind, _, pick = self.path.read_text().partition(" ")
        self.path.unlink()
        if kind == "flip":
            self._flip(float(pick))
        elif kind == "full":
            self._full = True

    def _no_number(self) -> None:
        """What the first layer of the next batch reads is no number, on this rank."""
        layer = next(m for m in self.model.modules() if isinstance(m, nn.ModuleList))[0]

        def poison(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            handle.remove()
            return inputs[0] * float("nan"), *inputs[1:]

        handle = layer.register_forward_pre_hook(poison)

    @torch.no_grad()
    def _flip(self, pick: float) -> None:
        """One bit of one weight, on this rank."""
        parameters = sorted(self.model.named_parameters())
        part = local(parameters[int(pick * len(parameters))][1].detach())
        whole = part.view(-1)[:1].view(torch.int32)
        whole ^= 1 << 21
