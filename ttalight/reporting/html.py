"""A comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ttalight.reporting.groups import Group
from ttalight.reporting.iterations import has_iterations, iteration_curves
from ttalight.reporting.published import Match, match_cells
from ttalight.reporting.render import MOST_DOMAINS, caption, cells, header, remarks, settings, shared_fields
from ttalight.reporting.results import Curve
from ttalight.reporting.summary import counted
from ttalight.reporting.svg import Point, Series, bar_plot, color, escape, line_plot, scatter_plot
from ttalight.reporting.table import Cell, Table
from ttalight.reporting.text import BEST, enumerate_fields, is_best

__all__ = ["html_heading", "html_list", "html_page", "html_table", "html_wide", "render_html"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; }
.wide { overflow-x: auto; } .quiet { opacity: .75; font-size: .9rem; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
.legend { font-size: .9rem; } .legend .entry { margin-right: 1.2em; white-space: nowrap; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg text.mark { font-size: 9.5px; opacity: .6; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .grid { stroke: currentColor; opacity: .12; } svg .axis { stroke: currentColor; opacity: .5; }
svg .mark { stroke: currentColor; opacity: .18; stroke-dasharray: 2 3; } svg text.mark { stroke: none; }
svg .whisker { stroke: currentColor; opacity: .8; }
"""

#: Points of a line along the stream, and names of domains above it: more would not be read.
_POINTS = 60
_MARKS = 30


def render_html(table: Table, notes: Sequence[str], matches: Sequence[Match] = ()) -> str:
    """Write the tables of :func:`render_markdown` and plots: along the stream, against steps, by domain, against speed.

    Args:
        table: The numbers.
        notes: Remarks to show above the table.
        matches: Published rows to show below it.

    Returns:
        A page without scripts and without links to anything outside of it.
    """
    labels = [row.group.label for row in table.rows]
    parts = [
        f'<p class="quiet">{escape(enumerate_fields(shared_fields(table)))}</p>',
        html_list(remarks(table, notes)),
        html_table(header(table), cells(table, 2, BEST, "{}"), colored=True),
        f'<p class="quiet">{escape(caption(table, "bold"))}</p>',
        *_plots(table),
        html_heading("Settings, ranks and cost"),
        html_table(*settings(table), colored=True),
    ]
    if matches:
        parts += [html_heading("Published beside measured"), html_table(*match_cells(matches, table.metric))]
        parts.append(html_list([match.text for match in matches]))
    title = " · ".join(labels) if len(labels) <= 4 else f"{len(labels)} rows"
    return html_page(title, parts, "ttalight compare")


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
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n'
        "</body>\n</html>\n"
    )


def _plots(table: Table) -> list[str]:
    legend = "".join(
        f'<span class="entry">{_key(index)}{escape(row.group.label)}</span>' for index, row in enumerate(table.rows)
    )
    plots = {
        "Accuracy along the stream": _along(table),
        "Accuracy against steps": _against_steps(table),
        f"{table.metric.capitalize()} by domain": _by_domain(table),
        "Accuracy against speed": _against_speed(table),
    }
    return [
        f'{html_heading(title)}\n<p class="legend">{legend}</p>\n{html_wide(plot)}'
        for title, plot in plots.items()
        if plot
    ]


def _along(table: Table) -> str:
    """Accuracy in stretches of the stream; runs without a curve, of an earlier version, are not shown."""
    series = [_line(row.group) for row in table.rows]
    if not _has_values(series):
        return ""
    rows = counted(table.rows[0].group.first["domains"])
    starts = [(float(row["start"]), row["name"]) for row in rows if "start" in row]
    marks = starts if len(starts) <= _MARKS and len({place for place, _ in starts}) == len(starts) else []
    return line_plot(series, "images", "accuracy in %", marks)


def _line(group: Group) -> Series:
    curves = [_joined(run.results["curve"]) for run in group.runs if "curve" in run.results]
    same = [curve for curve in curves if curve["images"] == curves[0]["images"]]
    if not same:
        return Series(group.label, (), ())
    columns = zip(*[curve["accuracy"] for curve in same], strict=True)
    values = [_mean([None if value is None else 100 * value for value in column]) for column in columns]
    return Series(group.label, same[0]["images"], values)


def _joined(curve: Curve) -> Curve:
    """Join neighbouring stretches until the line has few enough points."""
    images, running = curve["images"], curve["running"]
    step = -(-len(images) // _POINTS) or 1
    ends = [*range(step - 1, len(images) - 1, step), len(images) - 1] if images else []
    accuracy: list[float | None] = []
    before, hits_before = 0, 0.0
    for end in ends:
        share = running[end]
        hits = hits_before if share is None else share * images[end]
        accuracy.append(None if share is None else (hits - hits_before) / (images[end] - before))
        before, hits_before = images[end], hits
    return {"images": [images[end] for end in ends], "accuracy": accuracy, "running": [running[end] for end in ends]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _against_steps(table: Table) -> str:
    """Mean accuracy after fewer steps, of the rows whose runs have readings."""
    series = [_steps_line(row.group) for row in table.rows]
    return line_plot(series, "steps", "accuracy in %") if _has_values(series) else ""


def _has_values(series: Sequence[Series]) -> bool:
    return any(value is not None for line in series for value in line.y)


def _steps_line(group: Group) -> Series:
    curves = [iteration_curves(run.results) for run in group.runs if has_iterations(run.results)]
    if not curves or any(curve.steps != curves[0].steps for curve in curves):
        return Series(group.label, (), ())
    columns = zip(*[curve.mean for curve in curves], strict=True)
    values = [_mean([None if value is None else 100 * value for value in column]) for column in columns]
    return Series(group.label, curves[0].steps, values)


def _by_domain(table: Table) -> str:
    factor = 1.0 if table.metric in ("nll", "brier") else 100.0
    names = list(table.domains.values())
    known = any(cell.mean is not None for row in table.rows for cell in row.domains)
    if not known or len(names) > MOST_DOMAINS:
        return ""

    def scaled(values: Sequence[Cell], field: str) -> list[float | None]:
        found = [getattr(cell, field) for cell in values]
        return [None if value is None else factor * value for value in found]

    series = [
        Series(row.group.label, (), scaled(row.domains, "mean"), scaled(row.domains, "std")) for row in table.rows
    ]
    return bar_plot(series, names, f"{table.metric}{' in %' if factor > 1 else ''}")


def _against_speed(table: Table) -> str:
    points = []
    for index, row in enumerate(table.rows):
        speed = _mean([run.results["cost"]["images_per_second"] for run in row.group.runs])
        accuracy = _mean([run.results["mean"]["accuracy"] for run in row.group.runs])
        if speed and accuracy is not None and row.group.complete:
            points.append(Point(row.group.label, speed, 100 * accuracy, index))
    return scatter_plot(points, "images/s", "accuracy in %") if points else ""


def html_heading(text: str) -> str:
    """Return the heading of a part of a page."""
    return f"<h2>{escape(text)}</h2>"


def html_wide(content: str) -> str:
    """Return a part of a page, of HTML, that is scrolled where it is wider than the page."""
    return f'<div class="wide">{content}</div>'


def html_table(names: Sequence[str], rows: Sequence[Sequence[str]], colored: bool = False, words: bool = False) -> str:
    """Return a table; cells of `BEST` are bold.

    Args:
        names: Names of the columns.
        rows: Cells, as many as names.
        colored: Set the colours of the plots before the rows.
        words: The cells are words, not numbers.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for index, row in enumerate(rows):
        shown = [f"<b>{escape(cell[1:-1])}</b>" if is_best(cell) else escape(cell) for cell in row]
        shown[0] = (_key(index) if colored else "") + shown[0]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>")
    body = "\n".join(lines)
    kind = ' class="words"' if words else ""
    return html_wide(f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>")


def html_list(lines: Sequence[str]) -> str:
    """Return a list of remarks; nothing if there are none."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _key(index: int) -> str:
    return f'<span class="key" style="background:{color(index)}"></span>'
