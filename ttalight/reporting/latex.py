"""A comparison as a table of LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ttalight.reporting.render import caption, cells, domain_columns, header, remarks, shared_fields
from ttalight.reporting.table import Table
from ttalight.reporting.text import BEST, enumerate_fields, is_best, printable

__all__ = ["latex_text", "render_latex"]

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$",
}  # fmt: skip

#: So many domains have their deviations beside them; with more, a page is too narrow.
_FEW = 6


def latex_text(text: str) -> str:
    """Write text so that LaTeX prints it as it is: no commands, no comments, ASCII only."""
    shown = "".join(_SPECIAL.get(letter, letter) for letter in printable(text))
    return shown.encode("ascii", "backslashreplace").decode().replace("\\x", r"\textbackslash{}x")


def render_latex(table: Table, notes: Sequence[str]) -> str:
    """Write the first table for a paper: booktabs, percentages with one digit, the best of a column in bold.

    Args:
        table: The numbers.
        notes: Remarks, which stand in comments above it.

    Returns:
        A ``tabular`` with comments that say what it needs and what its numbers are.
    """
    names = header(table)
    first = len(names) - len(domain_columns(table))
    deviations = len(names) - first <= _FEW
    about = [
        r"In the preamble: \usepackage{booktabs,graphicx}. In the text: \begin{table*} \setlength{\tabcolsep}{3pt}",
        r"\centering \small \input{table.tex}, or where it is too wide \resizebox{\textwidth}{!}{\input{table.tex}}.",
        enumerate_fields(shared_fields(table)),
        caption(table, "bold"),
        "" if deviations else "Deviations of single domains are in table_wide.csv.",
        *remarks(table, notes),
    ]
    lines = [f"% {printable(line)}" for line in about if line]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\toprule"]
    titles = [name[:1].upper() + name[1:] for name in names[: first - 1]] + names[first - 1 :]
    lines += [_line([latex_text(name) for name in titles]), r"\midrule"]
    lines += [_line([latex_text(row[0]), *map(_number, row[1:])]) for row in cells(table, 1, BEST, "{}", deviations)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _number(cell: str) -> str:
    """Write a value with its deviation, or the ends of an interval."""
    text = cell[1:-1] if is_best(cell) else cell
    if text in ("-", "nan"):
        return "--"
    ends = re.fullmatch(r"(.+)\.\.(.+)", text)
    if ends is not None:
        return f"$[{ends[1]}, {ends[2]}]$"
    value, _, deviation = text.partition("±")
    value = f"${value}$" if value[0] in "+-" else value
    value = rf"\textbf{{{value}}}" if is_best(cell) else value
    return value + (rf"{{\scriptsize$\,\pm\,{deviation}$}}" if deviation else "")
