"""Plots of runs, laws and savings, as `Drawing`s. The only importers of matplotlib are these functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybridlm.scaling.analysis import Analysis, Law
from hybridlm.scaling.parity import Parity
from hybridlm.scaling.points import constrained
from hybridlm.scaling.runs import Run
from hybridlm.scaling.style import DASHES, FAINT, INK, MARKERS, MUTED, Drawing, draw, hue
from hybridlm.scaling.text import tokens as human
from hybridlm.scaling.trajectory import smooth

FEW = 6  # as many runs as have a colour of their own; more are coloured by arm

__all__ = ["FEW", "dots", "isolines", "loss_curves", "residuals", "savings", "speed"]


def loss_curves(runs: Sequence[Run]) -> Drawing:
    """Validation where it was measured, else training loss, of each run against tokens; the raw curve behind."""
    validated = [r for r in runs if len(r.series("val_bits_per_byte")[0]) >= 2]
    arms = list(dict.fromkeys(r.arm for r in runs))
    few = len(runs) <= FEW

    def paint(figure: Any, narrow: bool) -> None:
        panels = 2 if validated else 1
        axes = figure.subplots(*((panels, 1) if narrow else (1, panels)), squeeze=False).flat
        for axis, key, title in zip(axes, ("loss", "val_bits_per_byte"), (
                "Training loss, nats a token", "Validation, bits a byte"), strict=False):
            ends = []
            for k, run in enumerate(runs):
                i = k if few else arms.index(run.arm)
                tokens, values = run.series(key)
                if not len(tokens):
                    continue
                kept = tokens >= 0.01 * tokens[-1]
                tokens, values = tokens[kept], values[kept]
                if key == "loss":
                    if few:
                        axis.plot(tokens, values, color=hue(i), alpha=0.22, linewidth=1)
                    values = smooth(tokens, values)
                marker = MARKERS[i % len(MARKERS)] if key != "loss" and few else ""
                label = run.name if few else run.arm if run.arm not in [runs[j].arm for j in range(k)] else None
                axis.plot(tokens, values, color=hue(i), linestyle=DASHES[i % len(DASHES)], marker=marker, markersize=4,
                          label=label, linewidth=1.8 if few else 1.1)
                ends.append((tokens[-1], values[-1], i))
            if few:
                _end_labels(axis, ends)
            axis.set(title=title, xscale="log")
            axis.margins(x=0.02)
            _ticks(axis.xaxis)
            axis.set_xlabel("tokens")
            if len(runs) > 1 and axis is figure.axes[0]:
                axis.legend()

    told = "; ".join(f"{r.name} ends at {r.series('loss')[1][-1]:.3f}" for r in runs if len(r.series("loss")[1]))
    return draw("loss", f"Loss against training tokens, log scale. {told}.", "Loss against training tokens. Lines are "
                "means over records within 5% of their tokens; the single records lie behind them.", paint,
                narrow=(4.2, 6.2 if validated else 3.6))


def _end_labels(axis: Any, ends: Sequence[tuple[float, float, int]]) -> None:
    """Write each curve's last value at its end, but none over another."""
    low, high = axis.get_ylim()
    taken: list[float] = []
    for tokens, value, i in ends:
        if all(abs(value - t) > 0.055 * (high - low) for t in taken):
            axis.annotate(f"{value:.3f}", (tokens, value), xytext=(5, 0), color=hue(i), fontsize=10,
                          textcoords="offset points", va="center")
            taken.append(value)


def speed(runs: Sequence[Run]) -> Drawing:
    """Learning rate, gradient norm and tokens a second."""
    def paint(figure: Any, narrow: bool) -> None:
        axes = figure.subplots(*((3, 1) if narrow else (1, 3))).flat
        for axis, key, title in zip(axes, ("lr", "grad_norm", "tokens_per_s"),
                                    ("Learning rate", "Gradient norm", "Tokens a second"), strict=True):
            for i, run in enumerate(runs):
                tokens, values = run.series(key)
                if key == "tokens_per_s" and len(values) > 2:  # the last record may have timed nothing but its writing
                    held = values <= 20 * np.median(values)
                    tokens, values = tokens[held], values[held]
                axis.plot(tokens, values, color=hue(i), linewidth=1.3)
            axis.set_title(title)
            axis.set_xlabel("tokens")
            axis.ticklabel_format(axis="y", style="plain") if key != "lr" else None
            _ticks(axis.xaxis)
            if key == "tokens_per_s":
                _ticks(axis.yaxis)
            if key == "grad_norm":
                axis.set_yscale("log")
                _plain(axis.yaxis)
            else:
                axis.set_ylim(bottom=0)
            axis.locator_params(axis="x", nbins=4)

    return draw("steps", "Learning rate, gradient norm and tokens a second against training tokens.",
                "How the run went: schedule, gradient norm before clipping, speed.", paint, wide=(8.6, 2.7),
                narrow=(4.2, 6.6))


def dots(name: str, caption: str, rows: Sequence[str],
         series: Mapping[str, Sequence[tuple[float, float | None] | None]], label: str) -> Drawing:
    """A dot plot: one row a task or domain, one dot a model, bars of two standard errors where they are known."""
    def paint(figure: Any, narrow: bool) -> None:
        axis = figure.subplots()
        for i, (who, cells) in enumerate(series.items()):
            offset = (i - (len(series) - 1) / 2) * min(0.22, 0.7 / len(series))
            at = [(r + offset, *c) for r, c in enumerate(cells) if c is not None]
            if not at:
                continue
            errors = [2 * (e or 0.0) for _, _, e in at]
            axis.errorbar([v for _, v, _ in at], [y for y, _, _ in at], xerr=errors if any(errors) else None,
                          fmt=MARKERS[i % len(MARKERS)], color=hue(i), label=who, elinewidth=1.5, capsize=0)
            if len(series) == 1:
                for y, v, _ in at:
                    axis.annotate(f"{v:.3f}", (v, y), xytext=(0, 8), textcoords="offset points", ha="center",
                                  color=MUTED, fontsize=9)
        axis.set_yticks(range(len(rows)), list(rows), color=INK)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.margins(x=0.12)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        if len(series) > 1:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 if narrow else 3)

    told = "; ".join(f"{who}: " + ", ".join(f"{row} {c[0]:.3f}" for row, c in zip(rows, cells, strict=True) if c)
                     for who, cells in series.items())
    height = 1.1 + 0.42 * len(rows) + 0.25 * len(series)
    return draw(name, f"{label}: {told}.", caption, paint, wide=(8.6, height), narrow=(4.2, height + 0.3))


def isolines(a: Analysis, law: Law) -> Drawing:
    """Lines of equal loss of each arm's law over N and D, with the points that it was fitted to."""
    arms = law.fit.arms
    points = [p for p in a.points if p.arm in arms]
    n, d = np.array([p.params for p in points]), np.array([p.tokens for p in points])
    grid_n, grid_d = (np.geomspace(v.min() / 1.4, v.max() * 1.4, 80) for v in (n, d))
    values = {arm: law.fit.surfaces[arm].loss(grid_n[None], grid_d[:, None]) for arm in arms}
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
    levels = np.round(np.geomspace(low * 1.02, high * 0.97, 9), 2 if high - low > 0.3 else 3)

    def paint(figure: Any, narrow: bool) -> None:
        across = 1 if narrow else min(len(arms), 3)
        down = -(-len(arms) // across)
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
        for i, (arm, axis) in enumerate(zip(arms, axes, strict=False)):
            axis.set(xscale="log", yscale="log", xlim=grid_n[[0, -1]], ylim=grid_d[[0, -1]], title=arm,
                     xlabel="parameters N")  # before the lines, whose labels are placed by it
            lines = axis.contour(grid_n, grid_d, values[arm], levels=np.unique(levels), colors=[MUTED], linewidths=1)
            axis.clabel(lines, fontsize=9, fmt="%g", colors=[MUTED])
            for hollow in (False, True):
                own = [p for p in points if p.arm == arm and constrained(p) == hollow]
                axis.plot([p.params for p in own], [p.tokens for p in own], MARKERS[_rank(a, arm)], linestyle="",
                          color=hue(_rank(a, arm)), markerfacecolor="none" if hollow else hue(_rank(a, arm)))
            axis.grid(visible=False)
            _ticks(axis.xaxis)
            _ticks(axis.yaxis)
            if i % across == 0:
                axis.set_ylabel("tokens D")

    rows = -(-len(arms) // min(len(arms), 3))
    return draw("isolines", f"Lines of equal loss over parameters and tokens for {', '.join(arms)}, with "
                f"{len(points)} measured points.", f"Lines of equal loss ({a.unit}) of the {law.name} fit. Filled "
                "points were fitted; hollow ones saw their text more than four times and were not.", paint,
                wide=(8.6, 3.9 * rows), narrow=(4.2, 3.4 * len(arms)))


def savings(a: Analysis) -> Drawing:
    """Tokens for the baseline's loss, as a share of the baseline's, against N; by each fit, with intervals."""
    laws = [law for law in (a.joint, a.separate) if law and law.parities]
    floor, ceiling = 0.1, 3.0

    def paint(figure: Any, narrow: bool) -> None:
        axes = figure.subplots(*((len(laws), 1) if narrow else (1, len(laws))), squeeze=False, sharey=True).flat
        for axis, law in zip(axes, laws, strict=True):
            arms = list(dict.fromkeys(p.arm for p in law.parities))
            for k, arm in enumerate(arms):
                own = [p for p in law.parities if p.arm == arm]
                _bars(axis, own, _rank(a, arm), 1.0 + 0.06 * (k - (len(arms) - 1) / 2), floor, ceiling)
            sizes = [p.params for p in law.fit.points]
            axis.axvspan(min(sizes) / 1.25, max(sizes) * 1.25, color=FAINT, alpha=0.35, linewidth=0)
            axis.axhline(1, color=INK, linewidth=1)
            axis.set(xscale="log", yscale="log", ylim=(floor, ceiling), xlabel="parameters N",
                     title=("Joint fit" if law.fit.shared else "Separate fits"))
            axis.set_yticks([0.1, 0.2, 0.5, 1, 2], ["10%", "20%", "50%", "100%", "200%"])
            axis.minorticks_off()
            _ticks(axis.xaxis)
            if len(arms) > 1:
                axis.legend()
        figure.axes[0].set_ylabel(f"tokens needed, {a.baseline} = 100%")

    told = "; ".join(f"{law.name.split()[0]} fit: " + ", ".join(
        f"{p.arm} at {human(p.params)} {p.factor:.0%} ({p.low:.0%} to {p.high:.0%})" for p in law.parities)
        for law in laws)
    level = laws[0].parities[0].level
    return draw("savings", f"Tokens needed for the loss of {a.baseline}, by size. {told}.",
                f"Tokens needed for the loss of {a.baseline}, with {level:.0%} intervals; under the line fewer, over "
                "it more. Filled: inside the measured sizes and lengths. Hollow: extrapolated; an arrow goes on beyond "
                "the plot.", paint, narrow=(4.2, 3.4 * len(laws)))


def _bars(axis: Any, own: Sequence[Parity], i: int, shift: float, floor: float, ceiling: float) -> None:
    for measured in (True, False):
        some = [p for p in own if p.measured == measured]
        for p in some:
            low, high = max(p.low, floor), min(p.high, ceiling)
            axis.plot([p.params * shift] * 2, [low, high], color=hue(i), linewidth=2, alpha=0.9 if measured else 0.55,
                      solid_capstyle="round")
            for end, edge, arrow in ((p.low, floor, "v"), (p.high, ceiling, "^")):
                if (end < floor) if arrow == "v" else (end > ceiling):
                    axis.plot([p.params * shift], [edge], arrow, color=hue(i), clip_on=False)
        seen = [p for p in some if floor <= p.factor <= ceiling]
        label = own[0].arm if measured or not any(p.measured for p in own) else None
        axis.plot([p.params * shift for p in seen], [p.factor for p in seen], MARKERS[i % len(MARKERS)],
                  linestyle="", color=hue(i), markerfacecolor=hue(i) if measured else "none", markersize=7, label=label)


def residuals(a: Analysis, law: Law) -> Drawing:
    """What the law leaves unexplained, against D and against N; a pattern here is a law that does not hold."""
    fit = law.fit

    def paint(figure: Any, narrow: bool) -> None:
        axes = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True).flat
        for axis, key, label in zip(axes, ("tokens", "params"), ("tokens D", "parameters N"), strict=True):
            axis.axhspan(-100 * fit.sigma, 100 * fit.sigma, color=FAINT, alpha=0.5, linewidth=0)
            axis.axhline(0, color=INK, linewidth=1)
            for arm in fit.arms:
                rows = [i for i, p in enumerate(fit.points) if p.arm == arm]
                axis.plot([getattr(fit.points[i], key) for i in rows], 100 * fit.residuals[rows],
                          MARKERS[_rank(a, arm) % len(MARKERS)], linestyle="", color=hue(_rank(a, arm)), label=arm)
            axis.set(xscale="log", xlabel=label)
            _ticks(axis.xaxis)
        figure.axes[0].set_ylabel("measured over law, %")
        figure.axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return draw("residuals", f"Residuals of the {law.name} fit, standard deviation {fit.sigma:.2%}.",
                f"What the {law.name} fit leaves: measured loss over the law's, in percent; the band is one standard "
                "deviation. A slope or a bend means that the law does not hold.", paint, wide=(8.6, 3.2),
                narrow=(4.2, 5.6))


def _rank(a: Analysis, arm: str) -> int:
    return a.arms.index(arm)


def _ticks(axis: Any) -> None:
    """100M, 1B at powers of ten and at 2 and 5 between them where few fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        decades = np.log10(high / low)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.4 else (1,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: human(v) if v > 0 else "0"))


def _plain(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
