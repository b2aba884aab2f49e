"""A page to disk: OUT.html, OUT.md beside it, and the Markdown's plots in OUT-plots/."""

from __future__ import annotations

from pathlib import Path

from hybridlm.atomic import write_file
from hybridlm.errors import DataError
from hybridlm.report.content import Page
from hybridlm.report.html import to_html
from hybridlm.report.markdown import to_markdown
from hybridlm.scaling.style import Drawing

__all__ = ["write"]


def write(page: Page, out: str | Path) -> list[Path]:
    """Write the page; returns the files. `out` ends in .html."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"{out}: the page is HTML; give a name that ends in .html")
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the name of a file")
    plots = out.with_name(f"{out.stem}-plots")
    drawings = [b for s in page.sections for b in s.blocks if isinstance(b, Drawing)]
    files = {plots / f"{d.name}.svg": d.standalone() for d in drawings}
    files |= {out.with_suffix(".md"): to_markdown(page, plots.name), out: to_html(page)}
    for path, text in files.items():
        write_file(path, text.encode())
    return list(files)
