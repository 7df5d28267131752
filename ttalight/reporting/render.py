"""A comparison as plain text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ttalight.reporting.bootstrap import DRAWS, LEVEL
from ttalight.reporting.groups import Group
from ttalight.reporting.overview import STREAM_FIELDS, forgetting_line, protocol_fields
from ttalight.reporting.published import Match, match_cells
from ttalight.reporting.summary import by, counted, worst
from ttalight.reporting.table import RISING, Cell, Row, Table
from ttalight.reporting.text import (
    BEST,
    WIDTH,
    abbreviate,
    enumerate_fields,
    markdown_table,
    markdown_text,
    number,
    plain,
    text_blocks,
    wrap,
)

#: More domains than these are not set side by side; table.csv has them.
MOST_DOMAINS = 40

#: Longest label of a baseline in the head of a column.
_LABEL = 16

_ADVICE = (
    " (seed_everything changes the draws of a method, not the stream: for a spread over stream orders, vary data.seed "
    "and compare with --across-streams)"
)


def render_text(table: Table, notes: Sequence[str], matches: Sequence[Match] = (), width: int = WIDTH) -> str:
    """Write what all rows share, the notes, the table, and what differs between rows, for a terminal.

    The best value of a column has a star. A table that is too wide has a digit less, then no deviations of single
    domains, and at last continues below.

    Args:
        table: The numbers.
        notes: Remarks to print above the table.
        matches: Published rows to print below it.
        width: Columns of the terminal.

    Returns:
        Lines of at most ``width`` characters, and paragraphs of 120, unless a single name is longer.
    """
    above = [enumerate_fields(shared_fields(table)), *remarks(table, notes), caption(table, "*")]
    blocks = min((text_blocks(*content, width) for content in _contents(table)), key=len)
    header, rows = settings(table)
    parts = ["\n".join(wrap(line) for line in above if line), *blocks, *text_blocks(header, rows, width)]
    if matches:
        first, lines = match_cells(matches, table.metric)
        narrow = min((text_blocks(names, lines, width) for names in (first, _abbreviated(first))), key=len)
        parts += ["published beside measured:", *narrow]
        parts.append("\n".join(wrap(match.text) for match in matches))
    return "\n\n".join(parts)


def render_markdown(table: Table, notes: Sequence[str], matches: Sequence[Match] = ()) -> str:
    """Write the same as :func:`render_text` in Markdown, the best value of a column in bold.

    Args:
        table: The numbers.
        notes: Remarks to print above the table.
        matches: Published rows to print below it.

    Returns:
        Paragraphs, a list of the notes and tables.
    """
    parts = [
        markdown_text(enumerate_fields(shared_fields(table))),
        _items(remarks(table, notes)),
        markdown_text(caption(table, "bold")),
        markdown_table(header(table), cells(table, 2, BEST, "{}")),
        markdown_table(*settings(table)),
    ]
    if matches:
        parts += ["Published beside measured:", markdown_table(*match_cells(matches, table.metric))]
        parts.append(_items([match.text for match in matches]))
    return "\n\n".join(part for part in parts if part) + "\n"


def header(table: Table) -> list[str]:
    """Names of the columns of the first table."""
    gain, interval = _gain_column(table), "interval" if table.has_intervals else ""
    first = ["mean", gain, interval, "weighted" if _has_weighted(table) else "", "n"]
    return ["method", *filter(None, first), *domain_columns(table)]


def remarks(table: Table, notes: Sequence[str]) -> list[str]:
    """Return what a reader has to know, and what the table itself has to add to it."""
    own = list(notes)
    if not domain_columns(table):
        own.append(f"{len(table.domains)} domains, too many to be shown: table.csv (--output) has them")
    across = [f"{group.label} ({group.weights} files)" for group in _groups(table) if group.weights > 1]
    if across:
        own.append(f"averaged over runs whose source weights differ: {', '.join(across)}")
    for group in _groups(table):
        if len(group.runs) == 1:
            own += [f"{group.label}, {forgetting_line(found)}" for found in group.first.get("forgetting", [])]
    if any(name == "frost_procedural" and text.startswith("Frost") for (name, _), text in table.domains.items()):
        own.append("Frost is frost_procedural: textures from a program, not the published photographs")
    return [*own, *_equal_rows(table), *table.remarks]


def _equal_rows(table: Table) -> list[str]:
    """Say which rows have the same numbers in each of their runs, so that their spread says nothing."""
    equal = [row.group for row in table.rows if all(cell.equal for cell in (*row.domains, row.mean))]
    counts = by(equal, lambda group: f"{len(group.runs)} {group.repeats}")
    lines = [f"{count} gave equal numbers: {', '.join(group.label for group in own)}" for count, own in counts.items()]
    drawn = any(group.repeats == "seeds" for group in equal)
    return [f"{'; '.join(lines)}{_ADVICE if drawn else ''}"] if lines else []


def caption(table: Table, best: str) -> str:
    """Say what the numbers of the first table are."""
    parts = [unit(table)]
    repeats = dict.fromkeys(row.group.repeats for row in table.rows if len(row.group.runs) > 1)
    if repeats:
        parts.append(f"mean±sample standard deviation over n {' or '.join(repeats)}")
    if any(row["visit"] > 0 for group in _groups(table) for row in counted(group.first["domains"])):
        parts.append("visits of a domain averaged")
    if table.baseline is not None and _gain_column(table) == "gain":
        parts.append(f"gain: over {table.baseline}")
    if table.has_intervals:
        parts.append(f"interval: {100 * LEVEL:.0f} % of the gain, {DRAWS} paired bootstrap draws of images")
    if len(table.rows) > 1:
        parts.append(f"{best}: best of its column")
    return "; ".join(parts)


def cells(table: Table, digits: int, best: str, other: str, deviations: bool = True) -> list[list[str]]:
    """Write every row of the first table.

    Args:
        table: The numbers.
        digits: Digits of a percentage.
        best: Pattern for the best value of a column.
        other: Pattern for the rest.
        deviations: Write the deviations of single domains; that of the mean is always there.

    Returns:
        A cell for each name of :func:`header` and every row.
    """
    factor, digits = table.factor, digits if table.factor > 1 else digits + 1
    complete = [row.group.complete for row in table.rows]

    def values(column: Sequence[Cell]) -> list[str]:
        winners = _winners(column, complete, table.metric in RISING, factor, digits)
        patterns = [best if winner else other for winner in winners]
        return [_show(cell, factor, digits, pattern) for cell, pattern in zip(column, patterns, strict=True)]

    columns = [[row.group.label for row in table.rows], values([row.mean for row in table.rows])]
    if table.baseline is not None:
        columns.append([_show(row.gain or Cell(), factor, digits, other, "+") for row in table.rows])
    if table.has_intervals:
        columns.append([other.format(_interval(row, factor, digits)) for row in table.rows])
    if _has_weighted(table):
        columns.append(values([row.weighted for row in table.rows]))
    columns.append([str(len(row.group.runs)) for row in table.rows])
    if domain_columns(table):
        for column in zip(*[row.domains for row in table.rows], strict=True):
            columns.append(values(column if deviations else [Cell(cell.mean, None, cell.n) for cell in column]))
    return [list(row) for row in zip(*columns, strict=True)]


def unit(table: Table) -> str:
    """Name the measure and its unit."""
    return f"{table.metric} in {'%' if table.factor > 1 else 'nats' if table.metric == 'nll' else '[0, 2]'}"


def shared_fields(table: Table) -> dict[str, str]:
    """Return the settings that all rows share."""
    return _fields(_groups(table))[0]


def settings(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the second table: what differs between rows, their ranks, where they are weakest, costs."""
    groups = _groups(table)
    _, columns = _fields(groups)
    source = {"source": columns.pop("source")} if "source" in columns else {}
    lowest = [worst([row for run in group.runs for row in counted(run.results["domains"])]) for group in groups]
    if any(row.rank is not None for row in table.rows):
        columns["rank"] = ["-" if row.rank is None else number(row.rank, 1) for row in table.rows]
    if any("missed_batches" in group.first for group in groups):
        columns["missed batches"] = [plain(group.first.get("missed_batches")) or "-" for group in groups]
    columns |= {
        "worst domain": [_percent(one and one["domain"], one and one["domain_accuracy"]) for one in lowest],
        "worst group": [_percent(one and one["group"], one and one["group_accuracy"]) for one in lowest],
        "forwards/batch": [_cost(group, "forwards_per_batch", 2) for group in groups],
        "backwards/batch": [_cost(group, "backwards_per_batch", 2) for group in groups],
        "images/s": [_cost(group, "images_per_second", 0) for group in groups],
    } | source  # the path of a file is long, so it comes last
    labels = [group.label for group in groups]
    return ["method", *columns], [list(row) for row in zip(labels, *columns.values(), strict=True)]


def _groups(table: Table) -> list[Group]:
    return [row.group for row in table.rows]


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_text(line)}" for line in lines)


def _has_weighted(table: Table) -> bool:
    """Return whether domains have different numbers of images, so that the two means differ."""
    pairs = [(row.mean.mean, row.weighted.mean) for row in table.rows]
    return any(mean is not None and other is not None and abs(mean - other) > 1e-9 for mean, other in pairs)


def domain_columns(table: Table) -> list[str]:
    """Names of the columns of domains; none if they are too many."""
    return list(table.domains.values()) if len(table.domains) <= MOST_DOMAINS else []


def _gain_column(table: Table) -> str:
    if table.baseline is None:
        return ""
    return f"over {table.baseline}" if len(table.baseline) <= _LABEL else "gain"


def _contents(table: Table) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows from the most to the least detailed."""
    names = header(table)
    first = len(names) - len(domain_columns(table))
    for digits, deviations, short in ((2, True, False), (1, True, False), (1, False, False), (1, False, True)):
        # Every cell ends in a star or a space, so that digits stand below digits.
        rows = cells(table, digits, "{}*", "{} ", deviations)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        shown = [*names[:first], *abbreviate(names[first:], max(widths[first:], default=0))] if short else names
        padded = [name + " " if len(name) < width else name for name, width in zip(shown, widths, strict=True)]
        yield ["method", *padded[1:]], rows


def _abbreviated(names: Sequence[str]) -> list[str]:
    return [*names[:2], *abbreviate(names[2:], 5)]


def _interval(row: Row, factor: float, digits: int) -> str:
    if row.interval is None:
        return "-"
    low, high = (f"{factor * value:+.{digits}f}" for value in row.interval)
    return f"{low}..{high}"


def _show(cell: Cell, factor: float, digits: int, pattern: str, sign: str = "") -> str:
    if cell.n == 0:
        return pattern.format("-")
    if cell.mean is None:
        return pattern.format("nan")
    return pattern.format(f"{factor * cell.mean:{sign}.{digits}f}{_deviation(cell, factor, digits)}")


def _deviation(cell: Cell, factor: float, digits: int) -> str:
    """Write a deviation: nothing where values are equal, and never a zero where they are not."""
    if cell.std is None or cell.equal:
        return ""
    shown = number(factor * cell.std, digits)
    return f"±{shown}" if float(shown) else f"±<{10**-digits:.{digits}f}"


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
    own = []
    for group in groups:
        fields = protocol_fields(group.first)
        if group.weights > 1:
            fields["source"] = f"{group.weights} files"
        if len(group.streams) > 1:
            fields["stream_hash"] = f"{len(group.streams)} orders"
        own.append(fields | {"seeds": " ".join(dict.fromkeys(plain(run.results["seed"]) for run in group.runs))})
    columns = {name: [fields.get(name, "") for fields in own] for name in dict.fromkeys(n for o in own for n in o)}
    shared = {name: values[0] for name, values in columns.items() if len(set(values)) == 1}
    # How streams differ stands above the table.
    rest = columns.keys() - shared.keys() - {*STREAM_FIELDS, "stream_args"}
    return shared, {name: values for name, values in columns.items() if name in rest}


def _percent(name: str | None, accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{name} {number(100 * accuracy)}"


def _cost(group: Group, key: str, digits: int) -> str:
    values = [dict(run.results["cost"])[key] for run in group.runs]
    known = [float(value) for value in values if isinstance(value, (int, float))]
    return number(sum(known) / len(known), digits) if len(known) == len(values) else "-"
