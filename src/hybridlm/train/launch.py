"""`hybridlm train ... --nproc N --nnodes M`: ranks under torchrun's elastic agent, supervised, so that a run survives.

    launcher        this process: holds the rendezvous store, listens to beats, replaces lost agents, passes signals on
      agent         torchrun's elastic agent: one a machine (or several here, for trying things out)
        rank ...    the training processes

PyTorch is imported once, by the launcher; agents and ranks are forked from it, so that a rank is back in a fraction of
a second instead of the seconds that imports take. A rank that dies takes its group's connections with it, at which the
agents meet again at the store and start the ranks anew; a rank that is frozen is found by its missing beats and killed.
The store belongs to the launcher and outlives every agent. A mistake of the user, a signal, the end of the run: the
first rank that knows writes it into the store, and everything stops; whatever else goes wrong is a restart.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from hybridlm.errors import ConfigError, HybridLMError
from hybridlm.train.checksum import ReplicaError
from hybridlm.train.events import Events
from hybridlm.train.faults import Injector
from hybridlm.train.run import run
from hybridlm.train.watchdog import FOLDER, Beat, Watch

__all__ = ["LAUNCHED", "Launch", "is_here", "launch"]

LAUNCHED = "HYBRIDLM_LAUNCHED"  # set in ranks: host:port of the launcher's store
TRIES = 5  # starts in a row without a new step, after which the launcher gives up
GRACE = 120.0  # seconds that ranks have for their last checkpoint after SIGTERM
LOOK = 0.05  # seconds between two looks at the children


@dataclass(frozen=True)
class Launch:
    """How many processes, and where.

    Args:
        nproc: ranks of each agent.
        nnodes: "M", or "MIN:MAX" to go on with fewer machines while one is away.
        meet: HOST:PORT of the machine that holds the store; empty: all M agents run on this machine.
        faults: a file of faults to inject (`hybridlm.train.faults`), for testing.
    """

    nproc: int
    nnodes: str = "1"
    meet: str = ""
    faults: str = ""

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise ConfigError(f"nproc: must be positive, not {self.nproc}")
        parts = self.nnodes.split(":")
        if len(parts) > 2 or not all(p.isdigit() for p in parts) or not 1 <= int(parts[0]) <= int(parts[-1]):
            raise ConfigError(f"nnodes: must be M or MIN:MAX, not {self.nnodes!r}")
        if self.meet and not self.meet.rpartition(":")[2].isdigit():
            raise ConfigError(f"meet: must be HOST:PORT, not {self.meet!r}")

    @property
    def least(self) -> int:
        return int(self.nnodes.split(":")[0])

    @property
    def most(self) -> int:
        return int(self.nnodes.split(":")[-1])


def launch(how: Launch, recipe: str, changes: Mapping[str, str]) -> int:
    """Run `hybridlm.train.run(recipe, changes)` on all ranks until it ends; the exit code.

    0 at the end; 143 or 130 after SIGTERM or Ctrl-C, a checkpoint being saved first. Raises `HybridLMError` for what
    the user can mend, and when the ranks fail again and again without getting on.
    """
    out = changes.get("out", "")
    if not out:
        raise ConfigError("out: missing; give out=DIR, the folder of the run")
    launcher = _Launcher(how, recipe, dict(changes), Path(out))
    try:
        return launcher.supervise()
    finally:
        launcher.stop()


class _Launcher:
    def __init__(self, how: Launch, recipe: str, changes: dict[str, str], out: Path) -> None:
        self.how, self.recipe, self.changes = how, recipe, changes
        self.events = Events(out, f"launcher-{socket.gethostname()}")
        self.store, self.address = _open_store(how.meet)
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.beats = Path(tempfile.mkdtemp(prefix="hybridlm-beats-", dir=memory))
        os.environ[FOLDER], os.environ[LAUNCHED] = str(self.beats), self.address
        self.watch = Watch(self.beats)
        self.injector = Injector(Path(how.faults), out, self.beats, self.events) if how.faults else None
        self.agents: dict[int, int] = {}  # process id -> number
        self.asked: list[int] = []
        self.furthest = -1
        self.killed: dict[int, float] = {}

    def supervise(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        for agent in range(1 if self.how.meet else self.how.most):
            self._start(agent)
        self.events.write("launch", nproc=self.how.nproc, nnodes=self.how.nnodes)
        told, deadline = False, 0.0
        while self.agents:
            time.sleep(LOOK)
            ended = self._reap(restart=not self.asked)
            self._nurse()
            verdict = self._verdict()
            if verdict and verdict["code"]:
                if not self.asked and verdict["code"] not in (130, 143):
                    self.events.write("stop", code=verdict["code"], why=verdict["why"])
                    raise HybridLMError(verdict["why"])
                self.asked = self.asked or [verdict["code"] - 128]
            if self.asked and not told:
                told, deadline = True, time.monotonic() + GRACE
                ranks = [p.pid for p in self.watch.pulses() if p.rank >= 0]
                self.events.write("signal", number=self.asked[0])
                for pid in ranks:
                    _kill(pid, signal.SIGTERM)
                if not ranks:
                    break
            if self.asked and (time.monotonic() > deadline or len(self.asked) > 2 or not self.watch.pulses()):
                break
            if ended and verdict and not verdict["code"]:
                break
            if self.injector and not self.asked:
                self.injector.look(self.agents)
        self.events.write("stop", code=128 + self.asked[0] if self.asked else 0)
        return 128 + self.asked[0] if self.asked else 0

    def stop(self) -> None:
        """Leave nothing behind."""
        for pid in list(self.agents):
            _kill_group(pid)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(self.beats, ignore_errors=True)
        _usual_signals()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)

    def _start(self, number: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _agent(self.how, self.address, self.recipe, self.changes)
            finally:
                os._exit(code)
        self.agents[pid] = number

    def _reap(self, *, restart: bool) -> bool:
        """Take note of agents that ended, and replace those that were lost; whether one ended well."""
        well = False
        for pid, number in list(self.agents.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del self.agents[pid]
            _kill_group(pid)  # ranks that a lost agent left behind
            code = os.waitstatus_to_exitcode(status)
            well |= code == 0
            verdict = self._verdict()
            if code and restart and not verdict:
                self.events.write("detected", what=f"agent {number} ended with {code}")
                self.events.write("restart", agent=number)
                self._start(number)
        return well

    def _nurse(self) -> None:
        """Kill what is frozen or stuck, so that its group starts again; give up when nothing gets on."""
        for pulse, why in self.watch.sick():
            if self.killed.get(pulse.pid, 0.0) > time.monotonic() - 5:
                continue
            self.killed[pulse.pid] = time.monotonic()
            who = f"rank {pulse.rank}" if pulse.rank >= 0 else f"agent {self.agents.get(pulse.pid, '?')}"
            self.events.write("detected", what=f"{who}: {why}", pid=pulse.pid)
            print(f"{who}: {why}; starting again", file=sys.stderr, flush=True)
            _kill(pulse.pid, signal.SIGKILL)
        step = max((p.step for p in self.watch.pulses()), default=-1)
        if step > self.furthest:
            self.furthest = step
            self.store.set("starts", "0")
        elif int(self.store.get("starts")) > TRIES:
            why = self.store.get("error").decode()
            raise HybridLMError(f"{TRIES} starts in a row without a new step, giving up; the last error: "
                                f"{why or 'none told, the ranks were killed'}. The checkpoints are untouched")

    def _verdict(self) -> dict[str, Any]:
        """{"code", "why"} once a rank has told how the run ends."""
        try:
            if not self.store.check(["verdict"]):
                return {}
            verdict: dict[str, Any] = json.loads(self.store.get("verdict"))
        except RuntimeError:
            raise HybridLMError(f"{self.address}: the store is gone, and with it the machine that the others meet at; "
                                "start the same command again on all of them") from None
        return verdict


def _open_store(meet: str) -> tuple[TCPStore, str]:
    """The store that agents meet at, held here unless `meet` names another machine; and its HOST:PORT."""
    host, _, port = meet.rpartition(":")
    held = not meet or is_here(host)
    try:
        store = TCPStore(host or "127.0.0.1", int(port or 0), None, held, timeout=timedelta(seconds=300),
                         wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise HybridLMError(f"meet: no store at {meet} ({str(error).splitlines()[0]}); start the command on that "
                            "machine too, with the same --meet") from None
    if held:
        store.set("starts", "0")
        store.set("error", "")
        store.set("run", uuid.uuid4().hex)
    return store, f"{host or '127.0.0.1'}:{store.port}"


def is_here(host: str) -> bool:
    """Whether a name is this machine's."""
    try:
        socket.create_server((socket.gethostbyname(host), 0)).close()
    except OSError:
        return False
    return True


def _connect(address: str) -> TCPStore:
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), None, False, timeout=timedelta(seconds=300), wait_for_workers=False)


class _Agent(LocalElasticAgent):
    """torchrun's agent, that loses no time with ranks whose group is broken, and gives the others theirs."""

    def _stop_workers(self, *args: Any, **more: Any) -> None:
        self._shutdown(signal.SIGKILL)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **more: Any) -> None:
        if self._pcontext:
            self._pcontext.close(death_sig, timeout=int(GRACE))


def _agent(how: Launch, address: str, recipe: str, changes: dict[str, str]) -> int:
    """One agent's life: meets the others, runs its ranks, again and again until they end well."""
    os.setsid()  # so that it can be killed with its ranks, and Ctrl-C reaches the launcher alone
    _end_with_parent()
    _usual_signals()
    Beat(os.environ[FOLDER], -1)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the first rank's, new each round: an agent's dies with it
    if not os.environ.get("HYBRIDLM_DEBUG"):
        for name in ("torch.distributed.elastic", "torch.multiprocessing"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    store = _connect(address)
    run_id = store.get("run").decode()
    parameters = RendezvousParameters(
        backend="c10d", endpoint=address, run_id=run_id, min_nodes=how.least, max_nodes=how.most,
        local_addr=None if how.meet else "127.0.0.1", join_timeout=600, last_call_timeout=10)
    backend = C10dRendezvousBackend(store, run_id)
    handler = create_handler(store, backend, parameters)
    # A lost agent is noticed after 3 s; not every version of PyTorch takes this from the parameters.
    object.__setattr__(handler.settings, "keep_alive_interval", timedelta(seconds=1))
    spec = WorkerSpec(role="train", local_world_size=how.nproc, entrypoint=_rank, args=(recipe, changes),
                      rdzv_handler=handler, max_restarts=1 << 30,
                      monitor_interval=LOOK, local_addr=None if how.meet else "127.0.0.1")
    logs = DefaultLogsSpecs(log_dir=os.devnull)
    agent = _Agent(spec, logs, start_method="fork", exit_barrier_timeout=30)
    try:
        return 1 if agent.run().is_failed() else 0
    except SignalException as stop:
        return 128 + int(stop.sigval)


def _rank(recipe: str, changes: dict[str, str]) -> None:
    """One rank's life."""
    _end_with_parent()
    _usual_signals()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    Beat.from_environment()
    store = _connect(os.environ[LAUNCHED])
    rank = int(os.environ["RANK"])
    if rank == 0:
        store.add("starts", 1)
    code, why = 1, ""
    try:
        run(recipe, changes)
        code = 0
    except SystemExit as stop:
        code, why = stop.code if isinstance(stop.code, int) else 1, str(stop.code)
    except KeyboardInterrupt:
        code = 130
    except HybridLMError as error:
        why = str(error)
        if isinstance(error, ReplicaError):
            _again(store, rank, "" if rank else why)  # all ranks know the same
    except BaseException as error:
        if _peer_lost(error):
            _again(store, rank, "")
        import traceback

        traceback.print_exc()
        _again(store, rank, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    store.compare_set("verdict", "", json.dumps({"code": code, "why": why}))
    if code not in (0, 130, 143):
        time.sleep(GRACE)  # the launcher ends everything; leaving earlier would be a reason to start again


def _again(store: TCPStore, rank: int, why: str) -> None:
    """End in a way that makes the agents start all ranks anew; `why` is empty where another rank is the reason."""
    if why:
        print(f"rank {rank}: {why}; starting again", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            store.set("error", f"rank {rank}: {why}")
    os._exit(1)  # threads may be waiting for ranks that are gone


def _peer_lost(error: BaseException) -> bool:
    """Whether this only follows from another rank's end."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("Connection closed", "Connection reset", "Broken pipe", "timed out", "Timed out",
                                  "connection", "NCCL", "gloo", "Gloo"))


def _usual_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_with_parent() -> None:
    """Be killed when the process that forked this one is, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
