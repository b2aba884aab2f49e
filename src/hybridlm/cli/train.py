"""`hybridlm train RECIPE key=value ...`: train a model; the same command again goes on where it was."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, or a Python file that "
                                                                         "defines recipe(); none lists them.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings to change: data=PATH "
                                                         "out=DIR steps=N lr=X seed=S model.hidden_size=N ...")] = None,
    nproc: Annotated[int, typer.Option(help="Train on N processes of this machine (GPUs, or CPU cores), supervised: "
                                            "lost ones are started again.", metavar="N")] = 0,
    nnodes: Annotated[str, typer.Option(help="Machines: M, or MIN:MAX to go on with fewer while one is away.",
                                        metavar="M")] = "1",
    meet: Annotated[str, typer.Option(help="HOST:PORT of the machine that the others meet at; run the same command on "
                                           "each. Without it all M groups of N run on this machine.",
                                      metavar="HOST:PORT")] = "",
    again: Annotated[str, typer.Option("--from", help="Run a run again, from what its folder holds: its recipe, its "
                                                      "tokenizer; give out=NEW.", metavar="RUN_DIR")] = "",
    slurm: Annotated[str, typer.Option(help="Write the sbatch script of this run instead, - for stdout.",
                                       metavar="FILE")] = "",
    sbatch: Annotated[list[str] | None, typer.Option(help="For --slurm: an option of sbatch, as time=24:00:00.",
                                                     metavar="NAME=VALUE")] = None,
    faults: Annotated[str, typer.Option(help="A plan of faults to inject, for testing.", hidden=True)] = "",
) -> None:
    """Train a model by a recipe.

    hybridlm train tiny data=TEXT out=DIR steps=600 seed=1

    DIR gets the tokenizer, token shards, checkpoints, metrics.jsonl and, at the end, DIR/hf, a model folder. A run that
    was interrupted, even by kill -9, goes on from its newest good checkpoint when the same command runs again.

    hybridlm train 1b data=TEXT out=DIR --nproc 8                            8 GPUs of one machine

    hybridlm train 1b data=TEXT out=DIR --nproc 8 --nnodes 4 --meet HOST:29400   on each of 4 machines, DIR shared

    hybridlm train 1b data=TEXT out=DIR --nproc 8 --nnodes 4 --slurm run.sbatch --sbatch time=24:00:00
    """
    if again:
        recipe, settings = again, [*([recipe] if recipe else []), *(settings or [])]
    if recipe is None:
        return show_recipes()
    changes: dict[str, str] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE, for instance data=books/", param_hint="KEY=VALUE")
        if key in changes:
            raise typer.BadParameter(f"{key} is given twice", param_hint="KEY=VALUE")
        changes[key] = value
    if slurm:
        return write_slurm(slurm, recipe, settings or [], max(1, nproc), nnodes, sbatch or [])
    if nproc or nnodes != "1" or meet:
        from hybridlm.train.launch import Launch, launch

        raise typer.Exit(launch(Launch(max(1, nproc), nnodes, meet, faults), recipe, changes))
    from hybridlm.train import run

    run(recipe, changes)
    return None


def write_slurm(file: str, recipe: str, settings: list[str], nproc: int, nnodes: str, options: list[str]) -> None:
    """The sbatch script into a file or onto stdout."""
    from pathlib import Path

    from hybridlm.train.slurm import sbatch

    text = sbatch(recipe, settings, nproc=nproc, nnodes=nnodes, options=dict(o.partition("=")[::2] for o in options))
    if file == "-":
        print(text, end="")
        return
    Path(file).write_text(text, encoding="utf-8")
    print(f"{file}: submit it with sbatch {file}")


def show_recipes() -> None:
    """The recipes by name, and what can be set."""
    from dataclasses import fields

    from rich.console import Console
    from rich.table import Table

    from hybridlm.cli._common import count
    from hybridlm.train.recipe import Recipe
    from hybridlm.train.recipes import RECIPES, STAGED

    table = Table("recipe", "parameters", "length", "tokens a step", box=None, header_style="bold")
    for name, function in RECIPES.items():
        r = function()
        length = f"{r.seconds:g} s" if r.seconds else f"{r.steps:,} steps"
        table.add_row(name, count(r.model.num_parameters()), length, f"{r.tokens_per_step:,}")
    console = Console()
    for name, stages in STAGED.items():
        told = [f"{stage.name} x {len(stage.seeds)}" if stage.seeds else stage.name for stage in stages()]
        table.add_row(name, "", f"stages: {', '.join(told)}", "")
    console.print(table)
    names = [f.name for f in fields(Recipe) if f.name not in ("model", "name")]
    console.print(f"\nSettings: {', '.join(names)}, model.FIELD", highlight=False, markup=False)
