"""The sbatch script of a run: `hybridlm train ... --nproc 8 --nnodes 16 --slurm run.sbatch`.

Each machine runs one launcher (`hybridlm train ... --meet`), which starts and supervises its ranks. Slurm sends SIGTERM
ahead of the time limit, the ranks save and leave, and the job queues again; preempted or with a machine lost it queues
again by itself. The same command then goes on from the newest checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from hybridlm.errors import ConfigError

__all__ = ["sbatch"]

AHEAD = 180  # seconds between SIGTERM and the time limit: a step, a checkpoint, and the ranks' way out


def sbatch(recipe: str, settings: Sequence[str], *, nproc: int, nnodes: str = "1",
           options: Mapping[str, str] | None = None) -> str:
    """The script as text.

    Args:
        settings: KEY=VALUE as on the command line; `out` must be a folder that all machines see.
        nproc: GPUs (with device=cpu: processes) of each machine.
        nnodes: "M", or "MIN:MAX" to go on with fewer machines while one is away.
        options: further ones of sbatch by their long names; they replace the ones written here ("time": "24:00:00").
    """
    given = dict(s.partition("=")[::2] for s in settings)
    if not given.get("out"):
        raise ConfigError("out: missing; give out=DIR, a folder that all machines see")
    least, _, most = nnodes.partition(":")
    chosen = {
        "job-name": f"hybridlm-{recipe}".replace("/", "-"), "nodes": f"{least}-{most}" if most else least,
        "ntasks-per-node": "1", "exclusive": "", "output": "%x-%j.log", "open-mode": "append", "requeue": "",
        "signal": f"TERM@{AHEAD}",
    }
    if given.get("device") != "cpu":
        chosen["gpus-per-node"] = str(nproc)
    if most:
        chosen["no-kill"] = ""  # the others go on without a lost machine
    for key, value in (options or {}).items():
        if not key.replace("-", "").isalnum() or "\n" in value:
            raise ConfigError(f"sbatch: {key!r} is no long option of sbatch; give NAME or NAME=VALUE")
        chosen[key] = value
    head = "\n".join(f"#SBATCH --{key}" + (f"={value}" if value else "") for key, value in chosen.items())
    command = shlex.join(["hybridlm", "train", recipe, *settings, "--nproc", str(nproc), "--nnodes", nnodes])
    srun = "srun --kill-on-bad-exit=0" + (" --no-kill" if most else "")
    return f"""#!/bin/bash
{head}

# Where the launchers meet: the first machine, at a port of this job's own.
meet=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))

{srun} {command} --meet "$meet"
code=$?

# 143: asked to stop, and saved. That was the time limit (a cancelled job does not come here), so queue again.
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
