"""A page as one HTML file: no script, no outside asset, light and dark, from phone to desk."""

from __future__ import annotations

from html import escape

from hybridlm.report.content import Block, Facts, Folded, Page, Table, Text
from hybridlm.scaling.style import CSS, Drawing

__all__ = ["to_html"]

_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.6rem,1.2rem + 2vw,2.3rem);line-height:1.2;margin:0 0 .75rem;letter-spacing:-.01em}
h2{font-size:1.35rem;margin:3rem 0 1rem;padding-top:1.25rem;border-top:1px solid var(--faint);letter-spacing:-.005em}
h1,h2,summary{text-wrap:balance;overflow-wrap:anywhere}
p{margin:.6rem 0;max-width:44rem}
.lead{font-size:1.1rem;color:var(--ink);max-width:46rem}
.aside,figcaption,footer{color:var(--muted);font-size:.9rem}
.aside{border-left:3px solid var(--faint);padding-left:.8rem}
nav{margin:1.25rem 0 0;font-size:.95rem}
nav a{display:inline-block;margin:.3rem 1.1rem .3rem 0}
a{color:var(--hue0);text-underline-offset:.2em}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--hue0);outline-offset:3px}
figure{margin:1.75rem 0}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:inherit}
figcaption{margin-top:.4rem;max-width:44rem}
.narrow{display:none}
@media (max-width:40rem){.wide{display:none}.narrow{display:block}main{padding-top:1.5rem}}
.scroll{overflow-x:auto;margin:1.25rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;min-width:min(100%,24rem)}
caption{text-align:left;font-weight:600;padding:0 0 .5rem}
caption span{display:inline-block;max-width:min(44rem,calc(100vw - 2.5rem));position:sticky;left:0}
th,td{padding:.4rem .9rem .4rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--faint)}
th{font-weight:600}
thead th{color:var(--muted);font-weight:500;white-space:nowrap}
th.w,td.w{text-align:left}
td{white-space:nowrap}
td.w{white-space:normal;min-width:6rem}
td.w:last-child{min-width:min(18rem,60vw)}
tbody th{font-weight:500;white-space:nowrap}
td:last-child,th:last-child{padding-right:0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1.25rem 1.5rem;margin:1.5rem 0 2rem}
dl div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
dt{color:var(--muted);font-size:.88rem;line-height:1.35}
dd{margin:0;font-size:1.55rem;font-weight:600;line-height:1.25;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
details{margin:1rem 0}
summary{cursor:pointer;font-weight:600;padding:.4rem 0}
footer{margin-top:3.5rem;border-top:1px solid var(--faint);padding-top:1rem}
@media print{details>*{display:block}nav{display:none}}
"""


def to_html(page: Page) -> str:
    """The whole document."""
    anchors = [(f"s{i}", s.title) for i, s in enumerate(page.sections)]
    nav = "".join(f'<a href="#{a}">{escape(t)}</a>' for a, t in anchors)
    body = "".join(f'<section aria-labelledby="{a}"><h2 id="{a}">{escape(s.title)}</h2>'
                   f'{"".join(_block(b) for b in s.blocks)}</section>\n'
                   for (a, _), s in zip(anchors, page.sections, strict=True))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>{CSS}{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
{f'<nav aria-label="Contents">{nav}</nav>' if len(anchors) > 1 else ""}
</header>
{body}<footer><p>{escape(page.foot)}</p></footer>
</main>
</body>
</html>
"""


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f'<p{" class=aside" if block.aside else ""}>{escape(block.text)}</p>\n'
    if isinstance(block, Facts):
        items = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for value, what in block.items)
        return f"<dl>{items}</dl>\n"
    if isinstance(block, Drawing):
        return (f'<figure><div class="wide">{block.wide}</div><div class="narrow">{block.narrow}</div>'
                f"<figcaption>{escape(block.caption)}</figcaption></figure>\n")
    if isinstance(block, Folded):
        inner = "".join(_block(b) for b in block.blocks)
        return f"<details><summary>{escape(block.title)}</summary>{inner}</details>\n"
    return _table(block)


def _table(table: Table) -> str:
    def kind(i: int) -> str:
        return ' class="w"' if table.is_words(i) else ""

    head = "".join(f'<th scope="col"{kind(i)}>{escape(h)}</th>' for i, h in enumerate(table.head))
    rows = "".join("<tr>" + "".join(
        f'<th scope="row" class="w">{escape(c)}</th>' if i == 0 else f"<td{kind(i)}>{escape(c)}</td>"
        for i, c in enumerate(row)) + "</tr>" for row in table.rows)
    caption = f"<caption><span>{escape(table.caption)}</span></caption>" if table.caption else ""
    label = escape(table.caption or ", ".join(table.head))
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}'
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n")
