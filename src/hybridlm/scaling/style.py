"""How plots look: SVG whose colours are CSS variables, so that one drawing serves light and dark pages.

matplotlib draws with stand-in colours, which are then replaced in its SVG by variables; text stays text and takes the
page's font. Hues are those of Okabe and Ito, which the colour-blind can tell apart, darkened or lightened for contrast
of at least 3:1; markers and dashes differ as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CSS", "DASHES", "FAINT", "INK", "MARKERS", "MUTED", "Drawing", "draw", "hue"]

HUES = 6
MARKERS, DASHES = "osD^vP", ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), (0, (1, 1)), (0, (9, 3)))
INK, MUTED, FAINT, PAPER = "#000210", "#000211", "#000212", "#000213"
_STAND_INS = {INK: "ink", MUTED: "muted", FAINT: "faint", PAPER: "paper",
              **{f"#00030{i}": f"hue{i}" for i in range(HUES)}}
_LIGHT = {"ink": "#1b1f24", "muted": "#59626d", "faint": "#d9dee4", "paper": "#ffffff", "hue0": "#0072b2",
          "hue1": "#c85200", "hue2": "#008a65", "hue3": "#a8508a", "hue4": "#806600", "hue5": "#5b6470"}
_DARK = {"ink": "#e8ebee", "muted": "#a2acb7", "faint": "#323a43", "paper": "#14181d", "hue0": "#56b4e9",
         "hue1": "#f29a4b", "hue2": "#35cba0", "hue3": "#e08fc6", "hue4": "#e6d25a", "hue5": "#b6bec7"}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{k}:{v};" for k, v in colours.items())


CSS = f":root{{color-scheme:light dark;{_variables(_LIGHT)}}}@media (prefers-color-scheme:dark){{:root{{" \
      f"{_variables(_DARK)}}}}}"


@dataclass(frozen=True)
class Drawing:
    """A plot in two shapes, for wide and for narrow screens, each an `<svg>` element; `alt` says what it shows."""

    name: str
    alt: str
    caption: str
    wide: str
    narrow: str

    def standalone(self) -> str:
        """The wide shape as a file of its own, with its colours and background in it."""
        head, rest = self.wide.split(">", 1)
        style = f"<style>{CSS} text{{font-family:system-ui,sans-serif}} svg{{background:var(--paper)}}</style>"
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + head + ">" + style + rest


def hue(i: int) -> str:
    """The i-th colour of a series."""
    return f"#00030{i % HUES}"


def draw(name: str, alt: str, caption: str, paint: Callable[[Any, bool], None], *,
         wide: tuple[float, float] = (8.6, 3.9), narrow: tuple[float, float] = (4.2, 3.9)) -> Drawing:
    """Call `paint(figure, narrow)` for each shape; sizes in inches of 72 points."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shapes = {}
    for shape, size in (("wide", wide), ("narrow", narrow)):
        with rc_context(_RC | {"svg.hashsalt": f"{name}-{shape}"}):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure, shape == "narrow")
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        shapes[shape] = _clean(out.getvalue(), f"{name}-{shape}", alt)
    return Drawing(name, alt, caption, **shapes)


_RC: Any = {
    "svg.fonttype": "none", "font.size": 11, "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "text.color": INK, "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.titlecolor": INK, "axes.titlesize": 12,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": FAINT, "grid.linewidth": 0.8, "axes.linewidth": 0.8,
    "lines.linewidth": 1.8, "lines.markersize": 5.5, "legend.frameon": False, "legend.fontsize": 10,
    "xtick.major.width": 0.8, "ytick.major.width": 0.8, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "path.simplify": True, "path.simplify_threshold": 0.4,
}


def _clean(svg: str, prefix: str, alt: str) -> str:
    """The `<svg>` element alone, ids made its own, colours and fonts the page's."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    for colour, variable in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'url\(#([^)]+)\)', rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
            f'aria-label="{_escape(alt)}" viewBox="{box[1] if box else "0 0 100 100"}"')
    return head + ">" + rest.strip()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
