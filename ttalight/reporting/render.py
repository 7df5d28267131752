"""A comparison as plain text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ttalight.reporting.groups import Group
from ttalight.reporting.overview import STREAM_FIELDS, protocol_fields
from ttalight.reporting.table import Cell, Table
from ttalight.reporting.text import abbreviate, enumerate_fields, markdown_table, number, plain, text_blocks, wrap


def render_text(table: Table, notes: Sequence[str]) -> str:
    """Write what all rows share, the notes, the table, and what differs between rows, for a terminal.

    The best value of a column has a star. A table that is too wide has its domains abbreviated, then a digit less,
    and at last goes on below.

    Args:
        table: The numbers.
        notes: Remarks to print above the table.

    Returns:
        Lines of at most 120 characters, unless a single name is longer.
    """
    shared, _ = _fields(_groups(table))
    above = [enumerate_fields(shared), *notes, _caption(table, "*")]
    blocks = min((text_blocks(*content) for content in _contents(table)), key=len)
    header, rows = _settings(_groups(table))
    parts = ["\n".join(wrap(line) for line in above if line), *blocks, *text_blocks(header, rows)]
    return "\n\n".join(parts)


def render_markdown(table: Table, notes: Sequence[str]) -> str:
    """Write the same as :func:`render_text` in Markdown, the best value of a column in bold.

    Args:
        table: The numbers.
        notes: Remarks to print above the table.

    Returns:
        Paragraphs, a list of the notes and two tables.
    """
    shared, _ = _fields(_groups(table))
    header = ["method", "n", *table.domains.values(), *_last_columns(table)]
    parts = [
        enumerate_fields(shared),
        "\n".join(f"- {note}" for note in notes),
        _caption(table, "bold"),
        markdown_table(header, _cells(table, 2, "**{}**", "{}")),
        markdown_table(*_settings(_groups(table))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _groups(table: Table) -> list[Group]:
    return [row.group for row in table.rows]


def _last_columns(table: Table) -> list[str]:
    return ["mean"] if table.baseline is None else ["mean", f"over {table.baseline}"]


def _caption(table: Table, best: str) -> str:
    parts = [f"{table.metric} in {'nats' if table.metric == 'nll' else '%'}"]
    if any(len(group.runs) > 1 for group in _groups(table)):
        parts.append("mean±sample standard deviation over n seeds")
    if any(row["visit"] > 0 for group in _groups(table) for row in group.first["domains"]):
        parts.append("visits of a domain averaged")
    if len(table.rows) > 1:
        parts.append(f"{best}: best of its column")
    return "; ".join(parts)


def _contents(table: Table) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows from the most to the least detailed."""
    names = list(table.domains.values())
    for digits, short in ((2, False), (2, True), (1, True)):
        # Every cell ends in a star or a space, so that digits stand below digits.
        rows = _cells(table, digits, "{}*", "{} ")
        length = max(max(len(cell) for cell in row[2:]) for row in rows)
        shown = abbreviate(names, length - 1) if short else names
        yield ["method", "n", *(f"{name} " for name in [*shown, *_last_columns(table)])], rows


def _cells(table: Table, digits: int, best: str, other: str) -> list[list[str]]:
    """Label, number of seeds and values of every row; ``best`` and ``other`` are patterns for a value."""
    complete = [row.group.complete for row in table.rows]
    factor, digits = (1.0, digits + 1) if table.metric == "nll" else (100.0, digits)
    columns = []
    for cells in zip(*[(*row.domains, row.mean) for row in table.rows], strict=True):
        winners = _winners(cells, complete, table.metric == "accuracy", factor, digits)
        patterns = [best if winner else other for winner in winners]
        columns.append([_show(cell, factor, digits, pattern) for cell, pattern in zip(cells, patterns, strict=True)])
    if table.baseline is not None:
        columns.append([_show(row.gain or Cell(), factor, digits, other, "+") for row in table.rows])
    starts = [[row.group.label, str(len(row.group.runs))] for row in table.rows]
    return [[*start, *values] for start, values in zip(starts, zip(*columns, strict=True), strict=True)]


def _show(cell: Cell, factor: float, digits: int, pattern: str, sign: str = "") -> str:
    if cell.n == 0:
        return pattern.format("-")
    if cell.mean is None:
        return pattern.format("nan")
    deviation = "" if cell.std is None else f"±{number(factor * cell.std, digits)}"
    return pattern.format(f"{factor * cell.mean:{sign}.{digits}f}{deviation}")


def _winners(cells: Sequence[Cell], complete: Sequence[bool], highest: bool, factor: float, digits: int) -> list[bool]:
    """Find the best of the finished rows: none if all read the same, several if some do."""
    values = [
        None if cell.mean is None or not whole else round(factor * cell.mean, digits)
        for cell, whole in zip(cells, complete, strict=True)
    ]
    known = {value for value in values if value is not None}
    if len(known) < 2:
        return [False] * len(values)
    best = max(known) if highest else min(known)
    return [value == best for value in values]


def _fields(groups: Sequence[Group]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the settings that all rows share, and those that differ with one value a row."""
    own = [
        protocol_fields(group.first) | {"seeds": " ".join(plain(run.results["seed"]) for run in group.runs)}
        for group in groups
    ]
    columns = {name: [fields.get(name, "") for fields in own] for name in dict.fromkeys(n for o in own for n in o)}
    shared = {name: values[0] for name, values in columns.items() if len(set(values)) == 1}
    # How streams differ stands above the table.
    rest = columns.keys() - shared.keys() - set(STREAM_FIELDS)
    return shared, {name: values for name, values in columns.items() if name in rest}


def _settings(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the second table: what differs between rows, and what they cost."""
    _, columns = _fields(groups)
    source = {"source": columns.pop("source")} if "source" in columns else {}
    columns |= {
        "forwards/batch": [_cost(group, "forwards_per_batch", 2) for group in groups],
        "backwards/batch": [_cost(group, "backwards_per_batch", 2) for group in groups],
        "images/s": [_cost(group, "images_per_second", 0) for group in groups],
    } | source  # the path of a file is long, so it comes last
    labels = [group.label for group in groups]
    return ["method", *columns], [list(cells) for cells in zip(labels, *columns.values(), strict=True)]


def _cost(group: Group, key: str, digits: int) -> str:
    values = [dict(run.results["cost"])[key] for run in group.runs]
    known = [float(value) for value in values if isinstance(value, (int, float))]
    return number(sum(known) / len(known), digits) if len(known) == len(values) else "-"
