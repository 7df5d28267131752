"""Numbers as papers and repositories print them, with what is known of how they were measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from ttalight.errors import InputError

__all__ = ["PublishedRow", "published_rows"]

#: Settings that a file may state, as they are called in results; ``network`` and ``samples`` (of one domain) too.
FIELDS = (
    "network", "stream", "severity", "samples", "batch_size", "reset", "prediction", "steps", "optimizer", "lr", "norm",
    "seeds",
)  # fmt: skip

#: Those that an unadapted model does not have.
METHOD_FIELDS = ("reset", "prediction", "steps", "optimizer", "lr", "norm")


@dataclass(frozen=True)
class PublishedRow:
    """One method on one benchmark, as printed.

    Args:
        label: The method's name in the table.
        method: Class of the adapter here, as in results.
        model: Class of the task, where the method belongs to one.
        authors: Authors and year.
        source: These, title, arXiv id and table; and where the number was read if not in the paper.
        data: Names of the data set in results.
        protocol: What the source states, a subset of ``FIELDS``.
        accuracy: Domain -> accuracy in [0, 1]. Empty where only the mean is printed.
        mean: Mean accuracy over ``domains``, as printed.
        spread: What is printed after ±, as a fraction; None if nothing is.
        domains: Names of the domains.
    """

    label: str
    method: str
    model: str | None
    authors: str
    source: str
    data: tuple[str, ...]
    protocol: dict[str, Any]
    accuracy: dict[str, float]
    mean: float
    spread: float | None
    domains: tuple[str, ...]

    @property
    def short(self) -> str:
        """Label, authors and year."""
        return f"{self.label} ({self.authors})"


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Read all rows that come with the package.

    Returns:
        The rows in the order of the files' names.

    Raises:
        ValueError: If a file does not say what it has to; names the file and the row.
    """
    folder = files("ttalight.reporting.published")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return tuple(row for name in names for row in _read(name, folder.joinpath(name).read_text(encoding="utf-8")))


def _read(name: str, text: str) -> Iterator[PublishedRow]:
    paper = yaml.safe_load(text)
    for table in paper["tables"]:
        for row in table["rows"]:
            try:
                yield _row(paper, table, row)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{name}, {table.get('table')}, row {row!r:.60}: {error}") from error


def _row(paper: dict[str, Any], table: dict[str, Any], row: dict[str, Any]) -> PublishedRow:
    protocol = {**paper.get("protocol", {}), **table.get("protocol", {}), **row.get("protocol", {})}
    if row["method"] == "Source":
        protocol = {name: value for name, value in protocol.items() if name not in METHOD_FIELDS}
    unknown = protocol.keys() - set(FIELDS)
    if unknown:
        raise InputError(f"protocol has {sorted(unknown)}, known are {FIELDS}")
    domains = table["domains"]
    values = [_accuracy(value, table["measure"]) for value in row.get("values", [])]
    if values and len(values) != len(domains):
        raise InputError(f"{len(values)} values for {len(domains)} domains")
    where = f"{paper['authors']}, {paper['title']}, {table['table']}"
    return PublishedRow(
        label=row["label"],
        method=row["method"],
        model=row.get("model"),
        authors=paper["authors"],
        source=f"{where} (read in {paper['read_in']})" if "read_in" in paper else where,
        data=tuple(table["data"]),
        protocol=protocol,
        accuracy=dict(zip(domains, values, strict=True)) if values else {},
        mean=_accuracy(row["mean"], table["measure"]),
        spread=row["spread"] / 100 if "spread" in row else None,
        domains=tuple(domains),
    )


def _accuracy(percent: float, measure: str) -> float:
    if measure not in ("accuracy", "error"):
        raise InputError(f"measure must be accuracy or error, got {measure!r}")
    return percent / 100 if measure == "accuracy" else 1 - percent / 100
