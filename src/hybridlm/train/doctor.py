"""`hybridlm doctor`: what is wrong with the machines, found before a run rather than an hour into it.

Each check says good, doubtful (a warning) or bad; any bad one is exit code 1. On one machine it starts no processes
but those of the reduction check; for several machines the same command runs on each with `--meet`, and the clocks and
the reduction are then checked across them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hybridlm

__all__ = ["BAD", "DOUBTFUL", "GOOD", "Finding", "as_json", "examine", "judge_gpu"]

GOOD, DOUBTFUL, BAD = "good", "doubtful", "bad"
HOT, TOO_HOT = 50, 60  # degrees Celsius of an idle GPU
SKEW = 1.0  # seconds between two machines' clocks
SLOW_DISK = 100e6  # bytes a second
QUERY = "index,temperature.gpu,memory.used,memory.total,ecc.errors.uncorrected.volatile.total"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome."""

    what: str
    verdict: str  # good, doubtful, bad
    told: str


def examine(out: Path, *, need_gb: float = 0.0, gpus: int = 0, nproc: int = 0, nnodes: int = 1, meet: str = "",
            say: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Run every check; `say` hears each finding as it is made.

    Args:
        out: the folder that a run would write to.
        need_gb: what its checkpoints need.
        gpus: how many GPUs are expected, 0 for any number.
        nproc, nnodes, meet: as `hybridlm train` has them, for the reduction check; nproc 0 means one a GPU, or 2.
    """
    checks: list[Callable[[], list[Finding]]] = [
        _versions, lambda: _gpus(gpus), lambda: _disk(out, need_gb), _shared_memory, _memory, _cores,
        lambda: _together(nproc or torch.cuda.device_count() or 2, nnodes, meet)]
    findings = []
    for check in checks:
        for finding in check():
            say(finding)
            findings.append(finding)
    return findings


def _versions() -> list[Finding]:
    told = f"hybridlm {hybridlm.__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    if torch.version.cuda:
        told += f", CUDA {torch.version.cuda}"
    return [Finding("versions", GOOD, told)]


def _gpus(expected: int) -> list[Finding]:
    found = torch.cuda.device_count()
    if found == 0:
        return [Finding("GPUs", BAD if expected else GOOD, "none" + (f", {expected} expected" if expected else ""))]
    findings = [Finding("GPUs", GOOD if expected in (0, found) else BAD,
                        f"{found}" + (f", {expected} expected" if expected not in (0, found) else ""))]
    try:
        listed = _ask("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
        busy = _ask("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    except (OSError, subprocess.SubprocessError) as error:
        return [*findings, Finding("nvidia-smi", DOUBTFUL, f"does not answer ({error})")]
    findings += [judge_gpu(line) for line in listed]
    if busy:
        findings.append(Finding("left over", BAD, f"{len(busy)} processes hold GPU memory: "
                                f"{', '.join(line.split(',')[0] for line in busy[:8])}; end them"))
    return findings


def judge_gpu(line: str) -> Finding:
    """One line of nvidia-smi, as `QUERY` asks for it."""
    index, heat, used, total, errors = (word.strip() for word in line.split(","))
    told, verdict = f"{heat} C, {used} of {total} MiB used", GOOD
    if errors.isdigit() and int(errors):
        return Finding(f"GPU {index}", BAD, f"{told}, {errors} uncorrected memory errors; take it out")
    if heat.isdigit() and int(heat) >= HOT:
        verdict = BAD if int(heat) >= TOO_HOT else DOUBTFUL
        told += ", hot for an idle one"
    if used.isdigit() and total.isdigit() and int(used) > max(1024, int(total) // 50):
        verdict, told = BAD, told + ", memory is taken"
    return Finding(f"GPU {index}", verdict, told)


def _disk(out: Path, need_gb: float) -> list[Finding]:
    """Room in the run's folder, and the speed at which a checkpoint would reach the disk."""
    probe = out / f".doctor-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        block, count = os.urandom(1 << 22), 16
        began = time.monotonic()
        with probe.open("wb") as file:
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = count * len(block) / (time.monotonic() - began)
    except OSError as error:
        return [Finding("disk", BAD, f"{out}: cannot be written ({error.strerror})")]
    finally:
        with suppress(OSError):
            probe.unlink()
    free = shutil.disk_usage(out).free / 1e9
    room = Finding("disk room", BAD if free < max(1.0, need_gb) else GOOD,
                   f"{free:,.0f} GB free in {out}" + (f", {need_gb:g} needed" if need_gb else ""))
    return [room, Finding("disk speed", GOOD if speed > SLOW_DISK else DOUBTFUL, f"{speed / 1e6:,.0f} MB/s written")]


def _shared_memory() -> list[Finding]:
    """NCCL and the beats of the ranks live there."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return []
    free = shutil.disk_usage(place).free / 1e9
    return [Finding("shared memory", GOOD if free > 1 else DOUBTFUL if free > 0.06 else BAD,
                    f"{free:.1f} GB free" + ("" if free > 1 else "; start the container with more (--shm-size)"))]


def _memory() -> list[Finding]:
    info = Path("/proc/meminfo")
    if not info.exists():
        return []
    fields = dict(line.split(":") for line in info.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) / 1e6
    return [Finding("memory", GOOD if free > 4 else DOUBTFUL, f"{free:.0f} GB available")]


def _cores() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    told = f"{cores}, load {load:.1f}"
    return [Finding("cores", DOUBTFUL if load > max(1.0, cores / 2) else GOOD,
                    told + ("; something else is running" if load > max(1.0, cores / 2) else ""))]


def _together(nproc: int, nnodes: int, meet: str) -> list[Finding]:
    """Processes that add numbers up: wrong sums, slow links, clocks that differ."""
    host, _, port = (meet or "127.0.0.1:0").rpartition(":")
    try:
        here = not meet or _holds(host)
        store = dist.TCPStore(host, int(port), None, here, timeout=timedelta(seconds=120), wait_for_workers=False)
        number = store.add("machines", 1) - 1
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_reduce, (number, nproc, nproc * nnodes, f"{host}:{store.port}", results), nprocs=nproc)
        times = [results.get() for _ in range(nproc)]
    except (RuntimeError, OSError, ValueError, mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        return [Finding("reduction", BAD, f"{nproc * nnodes} processes cannot reach each other: "
                        f"{str(error).strip().splitlines()[-1]}")]
    wrong = [t["rank"] for t in times if not t["right"]]
    slowest = max(t["seconds"] for t in times)
    told = f"WRONG sums on ranks {wrong}" if wrong else f"{times[0]['bytes'] / slowest / 1e9:.2f} GB/s all-reduced"
    findings = [Finding("reduction", BAD if wrong else GOOD, f"{nproc * nnodes} processes, {told}")]
    if nnodes > 1:
        skew = max(t["skew"] for t in times)
        findings.append(Finding("clocks", GOOD if skew < SKEW else BAD, f"{skew:.2f} s apart"))
    store.add("done", 1)
    if here:  # the others still need the store
        deadline = time.monotonic() + 30
        while store.add("done", 0) < nnodes and time.monotonic() < deadline:
            time.sleep(0.05)
    return findings


def _holds(host: str) -> bool:
    from hybridlm.train.launch import is_here

    return is_here(host)


def _reduce(local: int, machine: int, nproc: int, world: int, address: str, results: Any) -> None:
    """One process of the reduction check."""
    rank = machine * nproc + local
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= nproc
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(host, int(port), None, False, timeout=timedelta(seconds=60), wait_for_workers=False)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    size = 1 << (26 if cuda else 20)
    numbers = torch.arange(size, dtype=torch.int64, device=device) % 1000
    seconds = []
    for _ in range(4):
        mine = numbers * (rank + 1)
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(mine)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    right = bool(torch.equal(mine, numbers * (world * (world + 1) // 2)))
    dist.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = [torch.empty_like(now) for _ in range(world)]
    dist.all_gather(clocks, now)
    spread = max(float(c) for c in clocks) - min(float(c) for c in clocks)
    results.put({"rank": rank, "right": right, "seconds": min(seconds), "bytes": size * 8, "skew": spread})
    dist.barrier()
    dist.destroy_process_group()


def _ask(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return [line for line in done.stdout.splitlines() if line.strip()]


def as_json(findings: list[Finding]) -> str:
    """For machines to read."""
    return json.dumps([{"what": f.what, "verdict": f.verdict, "told": f.told} for f in findings], indent=1)
