"""Parts of HTML pages that need nothing else: no scripts, no fonts, no files beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ttalight.reporting.svg import color, escape
from ttalight.reporting.text import BEST, is_best

__all__ = [
    "html_figure",
    "html_heading",
    "html_key",
    "html_list",
    "html_page",
    "html_panels",
    "html_table",
    "html_wide",
]

_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h1, p, li, dd, figcaption { overflow-wrap: anywhere; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .34rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th { vertical-align: bottom; } [title] { cursor: help; }
th[title] { text-decoration: underline dotted #8888; text-underline-offset: .2em; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; }
td small { opacity: .75; margin-left: .15em; }
.wide { overflow-x: auto; } .quiet { opacity: .8; font-size: .9rem; }
.pinned { --a: min(var(--label), 14rem); --b: var(--mean); }
.pinned :is(th, td):nth-child(-n+2), .pinned.three :is(th, td):nth-child(3) { position: sticky; background: Canvas; }
.pinned :is(th, td):first-child { left: 0; width: var(--a); min-width: var(--a); max-width: var(--a);
  white-space: normal; overflow-wrap: anywhere; }
.pinned .key { float: left; margin-top: .42em; }
.pinned :is(th, td):nth-child(2) { left: var(--a); width: var(--b); min-width: var(--b); max-width: var(--b); }
.pinned.three :is(th, td):nth-child(3) { left: calc(var(--a) + var(--b)); white-space: normal; }
.pinned:not(.three) :is(th, td):nth-child(2), .pinned.three :is(th, td):nth-child(3) { border-right: 1px solid #8884; }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: 0 0 1rem; font-size: .9rem; }
.facts dt { display: inline; opacity: .7; } .facts dd { display: inline; margin: 0 0 0 .4em; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 32rem; } figcaption { font-size: .9rem; }
svg { max-width: 100%; height: auto; } figure svg { width: 100%; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; } svg text.mark { opacity: .7; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .grid { stroke: currentColor; opacity: .12; } svg .axis { stroke: currentColor; opacity: .5; }
svg line.mark { stroke: currentColor; opacity: .18; stroke-dasharray: 2 3; }
svg .whisker, svg line.reference { stroke: currentColor; opacity: .8; } svg line.reference { stroke-width: 2; }
svg polyline.reference { opacity: .45; } svg .leader { stroke: currentColor; opacity: .3; }
@media (max-width: 600px) {
  body { margin: 1rem auto; padding: 0 .7rem; } h1 { font-size: 1.25rem; }
  th, td { padding: .25rem .35rem; } table { font-size: .85rem; }
  .pinned { --a: min(var(--label), 7.2rem); --b: 3.7rem; } td small { display: block; line-height: 1; }
}
"""

#: Width of a digit in a table, in rem.
_LETTER = 0.56


def html_page(title: str, parts: Sequence[str], name: str | None = None) -> str:
    """Return a page with its own style, without scripts.

    Args:
        title: Heading of the page.
        parts: What stands below it; empty ones are left out.
        name: What a browser calls it; the title by default.
    """
    body = "\n".join([f"<h1>{escape(title)}</h1>", *filter(None, parts)])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(name or title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def html_heading(text: str) -> str:
    """Return the heading of a part of a page."""
    return f"<h2>{escape(text)}</h2>"


def html_wide(content: str) -> str:
    """Return a part of a page, of HTML, that is scrolled where it is wider than the page."""
    return f'<div class="wide">{content}</div>'


def html_key(index: int) -> str:
    """Return a square in the colour of a row."""
    return f'<span class="key" style="background:{color(index)}"></span>'


def html_figure(svg: str, caption: str = "") -> str:
    """Return a figure of an ``svg`` element, as wide as there is room, below a caption, which is HTML."""
    above = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{above}{svg}</figure>"


def html_panels(figures: Sequence[str]) -> str:
    """Return figures side by side, as many in a line as the page is wide."""
    return f'<div class="panels">{"".join(figures)}</div>'


def html_table(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    colored: bool = False,
    words: bool = False,
    titles: Sequence[str] = (),
    pinned: int = 0,
) -> str:
    """Return a table; cells of `BEST` are bold, deviations small.

    Args:
        names: Names of the columns.
        rows: Cells, as many as names.
        colored: Set the colours of the plots before the rows.
        words: The cells are words, not numbers.
        titles: Explanations of the columns, shown where the pointer rests; empty ones are left out.
        pinned: So many first columns stay in view while the others scroll: none, two or three.
    """
    notes = [f' title="{escape(title)}"' if title else "" for title in titles or [""] * len(names)]
    head = "".join(f"<th{note}>{escape(name)}</th>" for name, note in zip(names, notes, strict=True))
    lines = []
    for index, row in enumerate(rows):
        label = _breakable(escape(row[0])) if pinned else escape(row[0])
        shown = [(html_key(index) if colored else "") + label, *map(_value, row[1:])]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>")
    kind = " ".join(filter(None, ["words" * words, "pinned" * (pinned > 0), "three" * (pinned > 2)]))
    first, mean = (max((len(row[column].strip(BEST)) for row in rows), default=0) for column in (0, 1))
    # Widths in rem: ch would differ between the bold head and the rows, and the offsets with it.
    style = f' style="--label:{_LETTER * first + 1.7:.1f}rem;--mean:{_LETTER * mean + 1:.1f}rem"' if pinned else ""
    body = "\n".join(lines)
    table = "<table" + (f' class="{kind}"' if kind else "") + f"{style}>"
    return html_wide(f"{table}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>")


def html_list(lines: Sequence[str]) -> str:
    """Return a list of remarks; nothing if there are none."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _breakable(label: str) -> str:
    """Allow a new line before each word of a name in camel case."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "<wbr>", label)


def _value(cell: str) -> str:
    value, _, deviation = (cell[1:-1] if is_best(cell) else cell).partition("±")
    shown = f"<b>{escape(value)}</b>" if is_best(cell) else escape(value)
    return shown + (f"<small>±{escape(deviation)}</small>" if deviation else "")
