"""A page as Markdown, plots as files beside it."""

from __future__ import annotations

from hybridlm.report.content import Facts, Folded, Page, Table, Text
from hybridlm.scaling.style import Drawing

__all__ = ["to_markdown"]


def to_markdown(page: Page, plots: str) -> str:
    """The page; `plots` is the folder of its drawings, relative to it."""
    lines = [f"# {_plain(page.title)}", "", _plain(page.lead), ""]
    for section in page.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            lines += _block(block, plots)
    return "\n".join([*lines, f"*{_plain(page.foot)}*", ""])


def _block(block: object, plots: str) -> list[str]:
    if isinstance(block, Text):
        return [f"> {_plain(block.text)}" if block.aside else _plain(block.text), ""]
    if isinstance(block, Drawing):
        return [f"![{_plain(block.alt)}]({plots}/{block.name}.svg)", "", f"*{_plain(block.caption)}*", ""]
    if isinstance(block, Facts):
        return [*(f"- {_plain(what)}: **{_plain(value)}**" for value, what in block.items), ""]
    if isinstance(block, Folded):
        return [f"### {_plain(block.title)}", "", *(line for b in block.blocks for line in _block(b, plots))]
    assert isinstance(block, Table)
    lines = [f"**{_plain(block.caption)}**", ""] if block.caption else []
    rule = ["---" if block.is_words(i) else "---:" for i in range(len(block.head))]
    return [*lines, _row(block.head), "|" + "|".join(rule) + "|", *(_row(r) for r in block.rows), ""]


def _row(cells: object) -> str:
    return "| " + " | ".join(_plain(c) for c in cells) + " |"  # type: ignore[attr-defined]


def _plain(text: str) -> str:
    """Text that means itself in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(str(text).split()))
