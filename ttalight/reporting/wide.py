"""The numbers of a comparison with one line for each method and one column for each number."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ttalight.reporting.table import Cell, Table
from ttalight.reporting.text import csv_text

__all__ = ["wide", "wide_csv"]

Value = str | int | float | None


def wide(table: Table) -> tuple[list[str], list[list[Value]]]:
    """Arrange the numbers with one line for each row of the table.

    Args:
        table: The table.

    Returns:
        Names of the columns and values: ``method``, ``mean``, with a baseline ``gain`` with the ends ``low`` and
        ``high`` of its interval, ``n``, one column for each domain, and where there are several runs in a row the
        standard deviations as ``mean std``, ``gain std`` and so on. Fractions are in percent.
    """
    names = list(table.domains.values())
    means = {"mean": [row.mean for row in table.rows]}
    if table.baseline is not None:
        means["gain"] = [row.gain or Cell() for row in table.rows]
    domains = {name: [row.domains[index] for row in table.rows] for index, name in enumerate(names)}
    columns: dict[str, list[Value]] = {"method": [row.group.label for row in table.rows]}
    columns |= {name: _scaled(table, [cell.mean for cell in cells]) for name, cells in means.items()}
    if table.has_intervals:
        for end, name in enumerate(("low", "high")):
            columns[name] = _scaled(table, [row.interval[end] if row.interval else None for row in table.rows])
    columns["n"] = [len(row.group.runs) for row in table.rows]
    columns |= {name: _scaled(table, [cell.mean for cell in cells]) for name, cells in domains.items()}
    if any(len(row.group.runs) > 1 for row in table.rows):
        both = {**means, **domains}
        columns |= {f"{name} std": _scaled(table, [cell.std for cell in cells]) for name, cells in both.items()}
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def wide_csv(table: Table) -> str:
    """Write :func:`wide` as CSV, percentages with two digits and other numbers with three; empty is missing."""
    digits = 2 if table.factor > 1 else 3
    header, lines = wide(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([csv_text(name) for name in header])
    for line in lines:
        writer.writerow([_written(value, digits) for value in line])
    return text.getvalue()


def _scaled(table: Table, values: Sequence[float | None]) -> list[Value]:
    return [None if value is None else table.factor * value for value in values]


def _written(value: Value, digits: int) -> Value:
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return csv_text(value) if isinstance(value, str) else value
