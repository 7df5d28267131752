"""Results that show themselves: as text in a terminal, as a table in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ttalight.reporting import results as files
from ttalight.reporting.html import html_table
from ttalight.reporting.overview import domain_cells, domain_table, protocol_header
from ttalight.reporting.results import Results
from ttalight.reporting.svg import escape

__all__ = ["ShownResults", "read_results", "shown"]


class ShownResults(dict[str, Any]):
    """The results of a run, a dict as any other, whose ``repr`` says what was run and what came out of each domain."""

    def __repr__(self) -> str:
        results = cast(Results, self)
        return f"{protocol_header(results)}\n{domain_table(results)}"

    def _repr_html_(self) -> str:
        results = cast(Results, self)
        return f"<p>{escape(protocol_header(results))}</p>{html_table(*domain_cells(results))}"


def shown(results: Results) -> Results:
    """Return results as ones that show themselves; see ``ShownResults``."""
    return cast(Results, ShownResults(results))


def read_results(path: str | Path) -> Results:
    """Read and check a result file, ``results.json`` or the folder that holds it; they show themselves.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another schema, or too long to be read.
    """
    return shown(files.read_results(path))
