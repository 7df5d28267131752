"""Tables and values as plain text, as Markdown and as CSV.

Names come from untrusted files. Each function here escapes those in what it returns: no control character
reaches a terminal, no HTML a Markdown page, no formula a spreadsheet.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

#: Columns of the terminal that tables are made for.
WIDTH = 120

#: Begin and end of a cell that stands out in its column; a pattern for its text.
BEST = "\x02{}\x03"

#: Longest text of one setting.
_LONGEST = 1000


def printable(text: str) -> str:
    """Write characters that are not printable, such as line ends and ESC, as Python's escapes."""
    if text.isprintable():
        return text
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def markdown_text(text: str) -> str:
    """Write text so that Markdown shows it as it is: no HTML, no links, no end of a cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(text), quote=False))


def csv_text(text: str) -> str:
    """Write text so that no spreadsheet takes it for a formula: an apostrophe stands before one."""
    text = printable(text)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@＝＋－＠") else text


def is_best(cell: str) -> bool:
    """Return whether a cell was made with `BEST`."""
    return len(cell) > 1 and (cell[0], cell[-1]) == (BEST[0], BEST[-1])


def number(value: float | None, digits: int = 2) -> str:
    """Write a value with fixed digits, and ``nan`` for one that is missing or not finite."""
    return "nan" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def plain(value: object) -> str:
    """Write a setting: nothing for None, list items with spaces between, those of a mapping as ``name=value``."""
    if value is None:
        return ""
    if isinstance(value, dict):
        value = [f"{name}={_nested(part)}" for name, part in value.items() if part is not None]
    text = " ".join(map(plain, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _nested(value: object) -> str:
    text = plain(value)
    return f"({text})" if isinstance(value, (dict, list)) else text


def enumerate_fields(fields: Mapping[str, str]) -> str:
    """Write settings as ``name value, name value``, without those that have no value."""
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value)


def wrap(text: str) -> str:
    """Break one paragraph into lines of the terminal's width."""
    return textwrap.fill(printable(text), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def text_blocks(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> list[str]:
    """Align a table; columns that do not fit follow in further blocks with the first column repeated.

    Args:
        header: Names of the columns; the first is aligned left, the others right.
        rows: Cells, as many as the header has.
        width: Widest line, exceeded only if two columns are wider.

    Returns:
        The blocks, each of several lines without an end.
    """
    header, rows = [printable(name) for name in header], [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str], columns: Sequence[int]) -> str:
        shown = [cells[0].ljust(widths[0])] + [cells[column].rjust(widths[column]) for column in columns]
        return " ".join(shown).rstrip()

    return [
        "\n".join(line(cells, columns) for cells in (header, ["-" * size for size in widths], *rows))
        for columns in _split(widths, width)
    ]


def _split(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Distribute columns 1, 2, ... over blocks, each beside column 0."""
    block: list[int] = []
    used = widths[0]
    for column in range(1, len(widths)):
        if block and used + 1 + widths[column] > width:
            yield block
            block, used = [], widths[0]
        block.append(column)
        used += 1 + widths[column]
    yield block


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, the first column aligned left and the others right; cells of `BEST` are bold."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    lines = [[_markdown_cell(cell) for cell in line] for line in (header, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ruler, *lines[1:]))


def _markdown_cell(cell: str) -> str:
    return f"**{markdown_text(cell[1:-1])}**" if is_best(cell) else markdown_text(cell)


def abbreviate(names: Sequence[str], length: int) -> list[str]:
    """Cut names to a length, or to the next one at which different names stay different.

    Args:
        names: The names; equal ones are cut alike.
        length: Characters wanted.

    Returns:
        As many names.
    """
    distinct = len(set(names))
    while len({name[:length] for name in names}) < distinct:
        length += 1
    return [name[:length] for name in names]
