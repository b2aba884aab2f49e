"""`hybridlm report OUT.html RUN... [EVAL_DIR...]`: one page from runs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli._common import note, size


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="The page; the same as Markdown is put beside it, "
                                                                 "with its plots in OUT-plots/.")],
    given: Annotated[list[str], typer.Argument(metavar="RUN|EVAL_DIR|POINTS.json...", help="Run folders, folders with "
                                               "results.json, JSON files of points; ARM=PATH names the arm.")],
    title: Annotated[str, typer.Option("--title", help="Of the page.")] = "",
    baseline: Annotated[str, typer.Option("--baseline", help="The arm that others are held against.")] = "",
) -> None:
    """Runs and evaluations as one self-contained page: curves, domains, tasks, data efficiency.

    hybridlm report report.html runs/first runs/second evals/first
    """
    from hybridlm.report import build, write

    files = write(build(given, title=title, baseline=baseline), out)
    for path in files[-2:]:
        note(f"{path} ({size(path.stat().st_size)})")
