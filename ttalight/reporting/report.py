"""A comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from ttalight.reporting.groups import Group
from ttalight.reporting.html import html_figure, html_heading, html_key, html_list, html_page, html_panels, html_table
from ttalight.reporting.iterations import has_iterations, iteration_curves
from ttalight.reporting.names import full_names, short_names
from ttalight.reporting.published import Match, match_cells
from ttalight.reporting.render import caption, cells, domain_columns, header, remarks, settings, shared_fields, unit
from ttalight.reporting.results import Curve
from ttalight.reporting.summary import counted
from ttalight.reporting.svg import Point, Series, bar_plot, escape, line_plot, scatter_plot
from ttalight.reporting.table import Row, Table
from ttalight.reporting.text import BEST

__all__ = ["render_html"]

#: Points of a line along the stream, and domains whose begin is marked in it: more would not be read.
_POINTS = 60
_MARKS = 30
_ACCURACY = "accuracy in %"

#: What the columns of both tables are.
_EXPLANATIONS = {
    "mean": "average over domains, each counted once: the number that papers report",
    "weighted": "average over images, where domains differ in size",
    "interval": "95 % interval of the gain: how far it depends on the images of the test set",
    "n": "number of runs behind the row",
    "seeds": "seed_everything of the runs: initial weights and draws of a method, not the stream",
    "rank": "place among the rows in a domain, averaged over domains: 1 is the best",
    "worst domain": "the domain with the lowest accuracy, and this accuracy",
    "worst group": "the group of corruptions with the lowest accuracy: noise, blur, weather or digital",
    "forwards/batch": "forward passes for each batch of the stream",
    "backwards/batch": "backward passes for each batch of the stream",
    "images/s": "images per second on the machine of the run",
    "missed batches": "batches that were predicted and not adapted to",
    "source": "file of the source weights and the beginning of its SHA-256",
    "lr": "learning rate",
    "steps": "updates for each batch",
    "reset": "when the method returns to the source weights",
    "norm": "where the statistics of BatchNorm layers come from",
    "prediction": "whether a batch is predicted before or after the update on it",
}


def render_html(table: Table, notes: Sequence[str], matches: Sequence[Match] = ()) -> str:
    """Write the tables of :func:`render_markdown` and plots: along the stream, against steps, by domain, against speed.

    Args:
        table: The numbers.
        notes: Remarks to show above the table.
        matches: Published rows to show below it.

    Returns:
        A page without scripts and without links to anything outside of it.
    """
    names, (second, lines) = header(table), settings(table)
    pinned = 2 if table.baseline is None else 3
    parts = [
        html_table(names, cells(table, 2, BEST, "{}"), colored=True, titles=_explained(table, names), pinned=pinned),
        f'<p class="quiet">{escape(caption(table, "bold"))}</p>',
        _facts(shared_fields(table)),
        html_list(remarks(table, notes)),
        *_plots(table),
        html_heading("Settings, ranks and cost"),
        html_table(second, lines, colored=True, titles=[_EXPLANATIONS.get(name, "") for name in second]),
    ]
    if matches:
        parts += [html_heading("Published beside measured"), html_table(*match_cells(matches, table.metric))]
        parts.append(html_list([match.text for match in matches]))
    title = _title(table)
    return html_page(title, parts, f"{title}: ttalight compare")


def _title(table: Table) -> str:
    """Say what was measured, of whom and on what."""
    fields, rows = shared_fields(table), len(table.rows)
    who = f"{rows} methods" if rows > 1 else table.rows[0].group.label
    where = [fields.get("data", ""), f"stream {fields['stream']}" if fields.get("stream") else ""]
    where.append(f"severity {fields['severity']}" if fields.get("severity") else "")
    place = ", ".join(filter(None, where))
    return f"{table.metric.capitalize()} of {who}{f' on {place}' if place else ''}"


def _explained(table: Table, names: Sequence[str]) -> list[str]:
    first = len(names) - len(domain_columns(table))
    known = _EXPLANATIONS | {f"over {table.baseline}": f"gain: mean minus the mean of {table.baseline}"}
    known["gain"] = known[f"over {table.baseline}"]
    return [*(known.get(name, "") for name in names[:first]), *full_names(table.domains)[: len(names) - first]]


def _facts(fields: Mapping[str, str]) -> str:
    pairs = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in fields.items() if value]
    return f'<dl class="facts">{"".join(pairs)}</dl>' if pairs else ""


def _plots(table: Table) -> list[str]:
    """Return headings and figures: a panel for each row, beside what it is compared with."""
    base = next((row for row in table.rows if row.group.label == table.baseline), table.rows[0])
    others = [(index, row) for index, row in enumerate(table.rows) if row is not base or len(table.rows) == 1]
    beside = f"Lines and marks without colour: {base.group.label}."
    plots = {
        "Accuracy along the stream": _lines(base, others, _stream_line, "images", _marks(base)),
        "Accuracy against steps": _lines(base, others, _steps_line, "steps"),
        f"{table.metric.capitalize()} by domain": _by_domain(table, base, others),
    }
    parts = []
    for title, figures in plots.items():
        if figures:
            compared = any('class="reference"' in figure for figure in figures)
            note = f'<p class="quiet">{escape(beside)}</p>' if compared else ""
            parts += [html_heading(title), note, html_panels(figures)]
    speed = _against_speed(table)
    return parts + ([html_heading("Accuracy against speed"), html_figure(speed)] if speed else [])


def _figure(index: int, row: Row, svg: str) -> str:
    return html_figure(svg, html_key(index) + escape(row.group.label))


def _lines(
    base: Row,
    others: Sequence[tuple[int, Row]],
    line: Callable[[Group, int | None], Series],
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
) -> list[str]:
    """Return a panel for each row that has values, with the line of the one that it is compared with."""
    reference = line(base.group, None)
    found = [(index, row, own) for index, row in others if _has_values(own := line(row.group, index))]
    if not found and _has_values(reference):
        found = [(0, base, reference)]
    values = [value for own in [reference, *(own for _, _, own in found)] for value in own.y if value is not None]
    return [
        _figure(index, row, line_plot([own] if row is base else [reference, own], x_label, _ACCURACY, marks, values))
        for index, row, own in found
    ]


def _has_values(line: Series) -> bool:
    return any(value is not None for value in line.y)


def _marks(row: Row) -> list[tuple[float, str]]:
    """Names of the domains and the places where they begin in the stream."""
    every = [counted(run.results["domains"]) for run in row.group.runs]
    starts = [[(float(one["start"]), one["name"]) for one in rows if "start" in one] for rows in every]
    if any(own != starts[0] for own in starts):
        return []  # the orders of the stream differ in their domains, too
    places = [place for place, _ in starts[0]]
    marks = list(zip(places, short_names([name for _, name in starts[0]]), strict=True))
    return marks if len(marks) <= _MARKS and len(set(places)) == len(places) else []


def _stream_line(group: Group, index: int | None) -> Series:
    """Accuracy in stretches of the stream; runs without a curve, of an earlier version, have no points."""
    curves = [_joined(run.results["curve"]) for run in group.runs if "curve" in run.results]
    same = [curve for curve in curves if curve["images"] == curves[0]["images"]]
    if not same:
        return Series(group.label, (), (), index=index)
    return Series(group.label, same[0]["images"], _averages([curve["accuracy"] for curve in same]), index=index)


def _averages(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average over runs, in percent."""
    means = [_mean(values) for values in zip(*columns, strict=True)]
    return [None if mean is None else 100 * mean for mean in means]


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


def _steps_line(group: Group, index: int | None) -> Series:
    """Mean accuracy after fewer steps; runs without readings have no points."""
    curves = [iteration_curves(run.results) for run in group.runs if has_iterations(run.results)]
    if not curves or any(curve.steps != curves[0].steps for curve in curves):
        return Series(group.label, (), (), index=index)
    return Series(group.label, curves[0].steps, _averages([curve.mean for curve in curves]), index=index)


def _by_domain(table: Table, base: Row, others: Sequence[tuple[int, Row]]) -> list[str]:
    names = domain_columns(table)
    if not names:
        return []

    def scaled(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else table.factor * value for value in values]

    means = {row.group.label: scaled([cell.mean for cell in row.domains]) for _, row in [*others, (0, base)]}
    known = [value for own in means.values() for value in own if value is not None]
    if not known:
        return []
    figures = []
    for index, row in others:
        bars = Series(row.group.label, (), means[row.group.label], scaled([cell.std for cell in row.domains]), index)
        reference = () if row is base else means[base.group.label]
        figures.append(_figure(index, row, bar_plot(bars, names, unit(table), reference, known)))
    return figures


def _against_speed(table: Table) -> str:
    points = []
    for index, row in enumerate(table.rows):
        speed = _mean([run.results["cost"]["images_per_second"] for run in row.group.runs])
        accuracy = _mean([run.results["mean"]["accuracy"] for run in row.group.runs])
        if speed and accuracy is not None and row.group.complete:
            points.append(Point(row.group.label, speed, 100 * accuracy, index))
    return scatter_plot(points, "images per second", _ACCURACY) if points else ""
