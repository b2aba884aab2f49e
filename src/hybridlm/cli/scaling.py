"""`hybridlm scaling POINTS.json|RUN...`: loss laws, tokens to parity, projections, and how sure they are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlm.cli._common import JsonOption, count, note, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from hybridlm.scaling import Parity, Point
    from hybridlm.scaling.analysis import Analysis

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def command(
    given: Annotated[list[str], typer.Argument(metavar="POINTS.json|RUN...", help="Run folders and JSON files of "
                                               "points; ARM=PATH names the arm.")],
    baseline: Annotated[str, typer.Option("--baseline", help="The arm the others are held against; `transformer` where "
                                                             "there is one.")] = "",
    share: Annotated[str, typer.Option("--share", help="What the joint fit shares between arms, of E,A,a,B,b; "
                                                       "`none` for separate fits alone.")] = "E,A,a,b",
    at: Annotated[list[str] | None, typer.Option("--at", metavar="N:D", help="Where to read savings: parameters and "
                                                 "tokens, as 7B:6T. Repeatable; 7B:6T and 70B:15T when left "
                                                 "out.")] = None,
    draws: Annotated[int, typer.Option("--draws", min=50, help="Refits of the bootstrap.")] = 1000,
    resample: Annotated[str, typer.Option("--resample", help="What the bootstrap draws: residuals, points, or runs "
                                                             "(errors along one run belong together).")] = "residuals",
    level: Annotated[float, typer.Option("--level", min=0.5, max=0.999, help="Level of the intervals.")] = 0.9,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    json: JsonOption = False,
) -> None:
    """How many tokens one architecture needs to equal another, by law and by trajectory, with intervals.

    hybridlm scaling runs/hybrid-* runs/twin-*
    hybridlm scaling points.json --at 1B:160B --at 7B:6T
    """
    from hybridlm.scaling import gather
    from hybridlm.scaling.analysis import analyse

    shared = [] if share.strip().lower() in ("none", "") else [s.strip() for s in share.split(",")]
    if unknown := [s for s in shared if s not in ("E", "A", "a", "B", "b")]:
        raise typer.BadParameter(f"{unknown[0]!r} is not among E, A, a, B, b", param_hint="--share")
    if resample not in ("residuals", "points", "runs"):
        raise typer.BadParameter(f"{resample!r} is not residuals, points or runs", param_hint="--resample")
    found = analyse(gather(given), baseline=baseline, shared=shared, at=[_place(a) for a in at or ()], draws=draws,
                    kind=resample, seed=seed, level=level)  # type: ignore[arg-type]
    if json:
        return print_json(found.to_dict())
    show(found)
    return None


def _place(text: str) -> tuple[float, float]:
    """7B:6T as (7e9, 6e12)."""
    parts = [re.fullmatch(r"([\d.]+(?:e\d+)?)([kmbt]?)", p.strip().lower()) for p in text.split(":")]
    try:
        n, d = [float(p[1]) * _UNITS[p[2]] for p in parts if p]
    except ValueError:
        n = d = 0.0
    if n <= 0 or d <= 0:
        raise typer.BadParameter(f"{text!r} is not N:D, as in 7B:6T", param_hint="--at")
    return n, d


def show(a: Analysis) -> None:
    """Tables: points, laws, savings by law, savings by trajectory; notes on stderr."""
    from rich.console import Console
    from rich.table import Table

    from hybridlm.scaling.points import constrained
    from hybridlm.scaling.text import describe, tokens

    console = Console()
    table = Table(title=f"Points (loss in {a.unit})", title_justify="left")
    for head in ("arm", "N", "points", "D", "D/N", "epochs", "loss"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    cells: dict[tuple[str, float, bool], list[Point]] = {}
    for p in sorted(a.points, key=lambda p: (p.arm, p.params, p.tokens)):
        cells.setdefault((p.arm, p.params, constrained(p)), []).append(p)
    for (arm, params, left_out), points in cells.items():
        first, last = points[0], points[-1]
        epochs = "?" if any(p.epochs is None for p in points) else f"{max(p.epochs or 0 for p in points):.2g}"
        table.add_row(arm, count(params), str(len(points)), _span(tokens(first.tokens), tokens(last.tokens)),
                      _span(f"{first.tokens / params:.3g}", f"{last.tokens / params:.3g}"),
                      epochs + (", not fitted" if left_out else ""), _span(f"{first.loss:.4f}", f"{last.loss:.4f}"))
    if a.points:
        console.print(table)
    for law in (a.joint, a.separate):
        if law is None:
            continue
        table = Table(title=f"L = E + A/N^a + B/D^b, {law.name}: noise {law.fit.sigma:.2%} of the loss",
                      title_justify="left")
        for head in ("arm", "E", "A", "a", "B", "b"):
            table.add_column(head, justify="left" if head == "arm" else "right")
        for arm, s in law.fit.surfaces.items():
            table.add_row(arm, f"{s.E:.4f}", f"{s.A:.4g}", f"{s.a:.4f}", f"{s.B:.4g}", f"{s.b:.4f}")
        console.print(table)
        if law.parities:
            console.print(_savings(law.parities, law.name, a.baseline))
    for line in describe(a):
        console.print(line, highlight=False, soft_wrap=True)
    if a.crossings:
        table = Table(title=f"Tokens to parity with {a.baseline}, by trajectory", title_justify="left")
        for head in ("arm", "N", "D", "how", "factor", ""):
            table.add_column(head, justify="right" if head in ("N", "D", "factor") else "left")
        for c in a.crossings:
            table.add_row(c.arm, count(c.params), tokens(c.tokens), c.how,
                          "-" if c.factor is None else f"{c.factor:.3f}", c.note)
        console.print(table)
    for line in a.notes:
        note(line)


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}-{last}"


def _savings(parities: tuple[Parity, ...], name: str, baseline: str) -> Table:
    from rich.table import Table

    from hybridlm.scaling.text import factor_words, tokens

    table = Table(title=f"Tokens to parity with {baseline}, by law, {name}", title_justify="left")
    for head in ("arm", "N", "D", "factor", f"{parities[0].level:.0%} interval", "where"):
        table.add_column(head, justify="left" if head in ("arm", "where") else "right")
    for p in parities:
        table.add_row(p.arm, count(p.params), tokens(p.tokens), *factor_words(p))
    return table
