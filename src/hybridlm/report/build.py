"""The page's content from runs, evaluation records and points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.errors import DataError
from hybridlm.report.content import Facts, Folded, Page, Section, Table, Text
from hybridlm.report.evaluations import Evaluation, find_results, read_evaluations
from hybridlm.report.goodput import goodput_section, read_spent
from hybridlm.scaling import gather, plots
from hybridlm.scaling.analysis import Analysis, Law, analyse
from hybridlm.scaling.points import constrained
from hybridlm.scaling.runs import Gathered, Run
from hybridlm.scaling.text import describe, factor_words, size, tokens

__all__ = ["build"]

BETTER_LOW = ("bits_per_byte", "bpb", "perplexity", "ppl", "loss")


def build(paths: Sequence[str | Path], *, title: str = "", baseline: str = "", draws: int = 1000) -> Page:
    """Read everything in `paths` (run folders, evaluation folders, .json of points) and lay it out."""
    numbers: list[str] = []
    evaluations: list[Evaluation] = []
    for given in map(str, paths):
        folder = Path(given.partition("=")[2]) if "=" in given and not Path(given).exists() else Path(given)
        records = find_results(folder) if folder.is_dir() else []
        if records or folder.name == "results.json":
            evaluations += read_evaluations(folder)
        if (folder.suffix == ".json" and folder.name != "results.json") or (folder / "metrics.jsonl").is_file():
            numbers.append(given)
        elif not records and folder.name != "results.json":
            what = "neither metrics.jsonl nor results.json in it" if folder.is_dir() else "no such file or folder"
            raise DataError(f"{folder}: {what}; give run folders, evaluation folders, or a .json of points")
    found = gather(numbers)
    found.runs = _named_apart(found.runs)
    sections = []
    if found.runs:
        sections.append(_runs(found.runs))
    if spent := [s for s in map(read_spent, found.runs) if s]:
        sections.append(goodput_section(spent))
    if any(len(r.val_bits_per_byte) > 1 for r in found.runs):
        sections.append(_domains(found.runs))
    if evaluations:
        sections.append(_evaluations(evaluations))
    analysis = None
    if found.points and len({p.arm for p in found.points} | {r.arm for r in found.runs}) > 1:
        analysis = analyse(found, baseline=baseline, draws=draws)
        sections.append(_scaling(analysis))
    if found.runs:
        sections.append(_recipes(found.runs))
    named = " and ".join(r.name for r in found.runs) if 0 < len(found.runs) < 3 else f"{len(found.runs)} runs"
    subject = f"Training report: {named}" if found.runs else "Data efficiency" if analysis else "Evaluation report"
    return Page(title or subject, _lead(found, evaluations, analysis), sections,
                "Written by hybridlm report. Bits per byte: information content of held-out text over the bytes of its "
                "UTF-8; lower is better, and models with different tokenizers compare.")


def _lead(found: Gathered, evaluations: Sequence[Evaluation], analysis: Analysis | None) -> str:
    parts = []
    done = [(r.val_bits_per_byte["all"], r) for r in found.runs if "all" in r.val_bits_per_byte]
    if done:
        best, run = min(done, key=lambda pair: pair[0])
        what = f"a {run.arm} of {size(run.params)} parameters outside its tables" if run.params else "a model"
        first = f"{run.name}, {what}, reached {best:.4f} bits per byte on held-out text after " \
                f"{tokens(run.tokens[-1])} tokens"
        parts.append(first + (f", the lowest of {len(done)} finished runs." if len(done) > 1 else "."))
    if found.points and not found.runs:
        parts.append(f"{len(found.points)} points of {len({p.arm for p in found.points})} arms.")
    law = (analysis.joint or analysis.separate) if analysis else None
    if law and (measured := [p for p in law.parities if p.measured]):
        p = max(measured, key=lambda p: p.params)
        parts.append(f"At {size(p.params)} parameters and {tokens(p.tokens)} tokens, the largest place measured, "
                     f"{p.arm} needs {p.factor:.1%} of the tokens of {p.baseline} for the same loss ({p.level:.0%} "
                     f"interval {p.low:.1%} to {p.high:.1%}, {law.name} fit).")
    if evaluations:
        parts.append(f"{len({e.task for e in evaluations})} tasks evaluated on "
                     f"{len({e.model for e in evaluations})} models.")
    return " ".join(parts)


def _runs(runs: Sequence[Run]) -> Section:
    section = Section("Runs")
    if len(runs) == 1:
        section.blocks.append(Facts(_facts(runs[0])))
    else:
        section.blocks.append(Table("", ("Run", "Kind", "Parameters", "Tokens", "Epochs", "Bits per byte",
                                         "Last loss", "Time", "Tokens/s"), [_row(r) for r in runs], 2))
    section.blocks.append(plots.loss_curves(runs))
    logged = all(r.series(key)[1].size for r in runs for key in ("grad_norm", "lr", "tokens_per_s"))
    if logged and len(runs) <= plots.FEW:
        section.blocks.append(plots.speed(runs))
    return section


def _row(run: Run) -> list[str]:
    seconds, speed = run.series("seconds")[1], run.series("tokens_per_s")[1]
    epochs = run.epochs(run.tokens[-1])
    bits, loss = run.val_bits_per_byte.get("all"), run.series("loss")[1]
    return [run.name, run.arm, size(run.params) if run.params else "?", tokens(run.tokens[-1]),
            "?" if epochs is None else f"{epochs:.2g}", "-" if bits is None else f"{bits:.4f}",
            f"{loss[-1]:.3f}" if len(loss) else "-", _time(seconds[-1]) if len(seconds) else "-",
            tokens(float(np.median(speed))) if len(speed) else "-"]


def _facts(run: Run) -> list[tuple[str, str]]:
    words = ("", "kind", "parameters outside the tables", "tokens", "epochs", "bits per byte, held out", "last loss, "
             "nats a token", "time", "tokens a second, median")
    return [(v, w) for v, w in zip(_row(run), words, strict=True) if w and v not in ("?", "-")]


def _domains(runs: Sequence[Run]) -> Section:
    told = [r for r in runs if len(r.val_bits_per_byte) > 1]
    names = list(dict.fromkeys(k for r in told for k in r.val_bits_per_byte))
    series: dict[str, list[tuple[float, float | None] | None]] = {
        r.name: [(r.val_bits_per_byte[k], None) if k in r.val_bits_per_byte else None for k in names]
        for r in told}
    rows = [[who, *(_cell(c) for c in cells)] for who, cells in series.items()]
    table = Table("Bits per byte by domain", ("Run", *names), rows)
    if len(told) > plots.FEW:
        return Section("Held-out text by domain", [table])
    drawing = plots.dots("domains", "Bits per byte of held-out text; lower is better.", names, series, "bits per byte")
    return Section("Held-out text by domain", [drawing, table])


def _evaluations(evaluations: Sequence[Evaluation]) -> Section:
    section = Section("Evaluations")
    models = list(dict.fromkeys(e.model for e in evaluations))
    cells = {(e.model, e.task, m): v for e in evaluations for m, v in e.metrics.items()}
    metrics = list(dict.fromkeys(m for _, _, m in cells))
    for i, metric in enumerate(metrics[:4]):
        tasks = list(dict.fromkeys(t for _, t, m in cells if m == metric))
        series = {m: [cells.get((m, t, metric)) for t in tasks] for m in models if any(
            (m, t, metric) in cells for t in tasks)}
        direction = "lower" if any(w in metric.lower() for w in BETTER_LOW) else "higher"
        section.blocks.append(plots.dots(f"eval{i}", f"{metric}; {direction} is better. Bars: two standard errors.",
                                         tasks, series, metric))
    rows = []
    for task in dict.fromkeys(e.task for e in evaluations):
        for metric in (m for m in metrics if any(t == task and k == m for _, t, k in cells)):
            rows.append([task, metric, *(_cell(cells.get((m, task, metric))) for m in models)])
    items = {e.task: e.items for e in evaluations if e.items}
    if items:
        rows = [[*r[:2], f"{items[r[0]]:,}" if r[0] in items else "?", *r[2:]] for r in rows]
    section.blocks.append(Table("Value, plus or minus one standard error", ("Task", "Metric", *(
        ("Items",) if items else ()), *models), rows, 2))
    return section


def _scaling(a: Analysis) -> Section:
    section = Section(f"Data efficiency against {a.baseline}")
    section.blocks += [Text(line) for line in describe(a)]
    laws = [law for law in (a.joint, a.separate) if law]
    if any(law.parities for law in laws):
        section.blocks.append(plots.savings(a))
    for law in laws:
        section.blocks.append(_law_table(law))
    if laws:
        section.blocks += [plots.isolines(a, laws[0]), plots.residuals(a, laws[0])]
        coefficients = [[law.name.split()[0], arm, *(f"{getattr(s, n):.4g}" for n in ("E", "A", "a", "B", "b"))]
                        for law in laws for arm, s in law.fit.surfaces.items()]
        section.blocks.append(Folded("Coefficients of L = E + A/N^a + B/D^b", [
            Table("", ("Fit", "Arm", "E", "A", "a", "B", "b"), coefficients, 2)]))
    if a.crossings:
        rows = [[c.arm, size(c.params), tokens(c.tokens), c.how, "-" if c.factor is None else f"{c.factor:.3f}", c.note]
                for c in a.crossings]
        section.blocks.append(Folded("Tokens to parity by trajectory, without a law", [
            Table("", ("Arm", "N", "D", "Compared", "Factor", "Note"), rows, last_words=True)]))
    points = [[p.arm, size(p.params), tokens(p.tokens), "?" if p.epochs is None else f"{p.epochs:.2g}", f"{p.loss:.4f}",
               "no, too many epochs" if constrained(p) else "yes"] for p in a.points]
    section.blocks.append(Folded(f"The {len(points)} points", [
        Table("", ("Arm", "N", "D", "Epochs", f"Loss, {a.unit}", "Fitted"), points, last_words=True)]))
    section.blocks += [Text(line, aside=True) for line in a.notes]
    return section


def _law_table(law: Law) -> Table:
    rows = [[p.arm, size(p.params), tokens(p.tokens), *factor_words(p)] for p in law.parities]
    level = f"{law.parities[0].level:.0%} interval" if law.parities else "interval"
    return Table(f"Tokens needed over the D of the baseline, by law, {law.name}",
                 ("Arm", "N", "D", "Factor", level, "Where"), rows, last_words=True)


def _recipes(runs: Sequence[Run]) -> Section:
    flat = {r.name: _flat(r.recipe) for r in runs if r.recipe}
    keys = list(dict.fromkeys(k for f in flat.values() for k in f))
    blocks: list[Any] = []
    if len(flat) > 1:
        different = [k for k in keys if len({f.get(k, "-") for f in flat.values()}) > 1]
        blocks.append(Table("What differs between the runs", ("Run", *different), [
            [who, *(f.get(k, "-") for k in different)] for who, f in flat.items()], 1 + len(different)))
    if flat:
        rows = [[k, *(f.get(k, "-") for f in flat.values())] for k in keys]
        blocks.append(Folded("All settings", [Table("", ("Setting", *flat), rows, 1 + len(flat))]))
    return Section("Settings", blocks or [Text("The runs came without their recipe.json.", aside=True)])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for k, v in value.items():
        if isinstance(v, dict) and v:
            out |= _flat(v, f"{prefix}{k}.")
        elif isinstance(v, list) and v and all(isinstance(x, str) for x in v):
            runs: list[list[Any]] = []
            for x in v:
                if runs and runs[-1][0] == x:
                    runs[-1][1] += 1
                else:
                    runs.append([x, 1])
            out[prefix + k] = ", ".join(x if n == 1 else f"{n} x {x}" for x, n in runs)
        elif v not in ("", None, {}, []):
            out[prefix + k] = f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) and v > 9999 else str(v)
    return out


def _cell(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.4f}" + ("" if value[1] is None else f" ± {value[1]:.4f}")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name get their folder's in front, or all of their path where that is the same too."""
    for name_of in (lambda r: f"{r.path.resolve().parent.name}/{r.path.resolve().name}", lambda r: str(r.path)):
        names = [r.name for r in runs]
        runs = [replace(r, name=name_of(r)) if names.count(r.name) > 1 else r for r in runs]
    return list(runs)
