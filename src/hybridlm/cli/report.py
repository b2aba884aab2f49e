"""`hybridlm report OUT.html RUN... [EVAL_DIR...]`: one page from runs and evaluations, or `... RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli._common import note, size


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT.html|RUN", help="The page; the same as Markdown is put "
                                        "beside it, plots in OUT-plots/. A run alone gets RUN/report.html.")],
    given: Annotated[list[str] | None, typer.Argument(metavar="RUN|EVAL_DIR|POINTS.json...", help="Run folders, "
                                                      "folders with results.json, JSON files of points; ARM=PATH "
                                                      "names the arm.")] = None,
    title: Annotated[str, typer.Option("--title", help="Of the page.")] = "",
    baseline: Annotated[str, typer.Option("--baseline", help="The arm that others are held against.")] = "",
) -> None:
    """Runs and evaluations as one self-contained page: curves, domains, tasks, data efficiency.

    hybridlm report report.html runs/first runs/second evals/first
    """
    if not given:
        if not out.is_dir():
            raise typer.BadParameter("give the runs to report on after it, or a run's folder alone",
                                     param_hint="OUT.html")
        out, given = out / "report.html", [str(out)]
    for path in (Path(name.partition("=")[2] or name) for name in given):
        _measure(path)
    from hybridlm.report import build, write

    files = write(build(given, title=title, baseline=baseline), out)
    for path in files[-2:]:
        note(f"{path} ({size(path.stat().st_size)})")


def _measure(run: Path) -> None:
    """Leave RUN/goodput.json where the run's events are newer than it, or there is none."""
    events = [f.stat().st_mtime for f in (run / "events").glob("*.jsonl")]
    made = run / "goodput.json"
    if not events or (made.is_file() and made.stat().st_mtime >= max(events)):
        return
    from hybridlm.errors import DataError
    from hybridlm.train.goodput import write_goodput

    try:
        write_goodput(run)
    except DataError as error:
        note(f"no goodput: {error}")
