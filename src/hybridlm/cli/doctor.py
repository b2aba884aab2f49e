"""`hybridlm doctor`: check the machines before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(help="The folder that the run will write to.")] = Path("runs"),
    need: Annotated[float, typer.Option(help="Room that the checkpoints need, in GB.", metavar="GB")] = 0.0,
    gpus: Annotated[int, typer.Option(help="GPUs that this machine must have.", metavar="N")] = 0,
    nproc: Annotated[int, typer.Option(help="Processes of this machine in the reduction check; 0: one a GPU, or 2.",
                                       metavar="N")] = 0,
    nnodes: Annotated[int, typer.Option(help="Machines; run the same command on each.", metavar="M")] = 1,
    meet: Annotated[str, typer.Option(help="HOST:PORT of the machine that the others meet at.",
                                      metavar="HOST:PORT")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One list of objects, for machines to read.")] = False,
) -> None:
    """Check the machines before a run: GPUs, disk, memory, clocks, and whether processes add up right.

    Exits with 1 when something is bad.
    """
    from rich.console import Console

    from hybridlm.errors import ConfigError
    from hybridlm.train import doctor

    if nnodes > 1 and not meet:
        raise ConfigError("meet: missing; give --meet HOST:PORT, the same on all machines")
    console = Console()
    colours = {doctor.GOOD: "green", doctor.DOUBTFUL: "yellow", doctor.BAD: "red"}

    def show(finding: doctor.Finding) -> None:
        console.print(f"[{colours[finding.verdict]}]{finding.verdict:9}[/] {finding.what:14} {finding.told}",
                      highlight=False)

    findings = doctor.examine(out, need_gb=need, gpus=gpus, nproc=nproc, nnodes=nnodes, meet=meet,
                              say=(lambda finding: None) if as_json else show)
    if as_json:
        print(doctor.as_json(findings))
    if any(f.verdict == doctor.BAD for f in findings):
        raise typer.Exit(1)
