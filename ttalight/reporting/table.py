"""The numbers of a comparison: methods in rows, domains in columns, seeds in a cell."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ttalight.reporting.groups import Group, Run
from ttalight.reporting.overview import domain_names
from ttalight.reporting.results import Metric


@dataclass(frozen=True)
class Cell:
    """A measure over ``n`` seeds: mean and sample standard deviation, None where they do not exist."""

    mean: float | None = None
    std: float | None = None
    n: int = 0


@dataclass(frozen=True)
class Row:
    """What one group of runs reached in each domain, on average, and over the baseline if there is one."""

    group: Group
    domains: tuple[Cell, ...]
    mean: Cell
    gain: Cell | None


@dataclass(frozen=True)
class Table:
    """Rows of equal length; ``domains`` maps (name, severity) to the name of a column."""

    metric: Metric
    domains: dict[tuple[str, int | None], str]
    baseline: str | None
    rows: tuple[Row, ...]


def spread(values: Sequence[float | None]) -> Cell:
    """Summarise one value a seed; a missing one makes the mean missing rather than better."""
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return Cell(n=len(values))
    return Cell(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def tabulate(groups: Sequence[Group], metric: Metric, baseline: str | None = None) -> Table:
    """Arrange groups of runs; several visits of a domain count as their mean.

    Args:
        groups: The rows in order.
        metric: The measure.
        baseline: Label or method of the row that the others are compared with.

    Returns:
        The table.

    Raises:
        ValueError: If no row, or more than one, is the baseline.
    """
    domains = domain_names([row for group in groups for run in group.runs for row in run.results["domains"]])
    base = _find(groups, baseline) if baseline is not None else None
    rows = [
        Row(
            group=group,
            domains=tuple(spread(_visited(group, *place, metric)) for place in domains),
            mean=spread(list(_means(group, metric).values())),
            gain=_gain(group, base, metric) if base else None,
        )
        for group in groups
    ]
    return Table(metric, domains, base.label if base else None, tuple(rows))


def table_csv(table: Table) -> str:
    """Write one line for each row and domain, and one for its mean, with values as measured: fractions and nats.

    Args:
        table: The table.

    Returns:
        CSV with columns label, method, domain, severity, metric, mean, std (empty for one seed) and n.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "method", "domain", "severity", "metric", "mean", "std", "n"])
    for row in table.rows:
        for (name, severity), cell in [*zip(table.domains, row.domains, strict=True), (("mean", None), row.mean)]:
            if cell.n:
                method = row.group.first["method"]
                writer.writerow([row.group.label, method, name, severity, table.metric, cell.mean, cell.std, cell.n])
    return text.getvalue()


def _visited(group: Group, name: str, severity: int | None, metric: Metric) -> list[float | None]:
    """One value for every run that visited a domain."""
    visits = [_of_domain(run, name, severity, metric) for run in group.runs]
    return [spread(values).mean for values in visits if values]


def _of_domain(run: Run, name: str, severity: int | None, metric: Metric) -> list[float | None]:
    return [row[metric] for row in run.results["domains"] if (row["name"], row["severity"]) == (name, severity)]


def _means(group: Group, metric: Metric) -> dict[int | None, float | None]:
    """Mean over domains by seed; nothing for a run that has not seen all of them."""
    return {run.results["seed"]: run.results["mean"][metric] for run in group.runs} if group.complete else {}


def _gain(group: Group, base: Group, metric: Metric) -> Cell:
    """Difference of means; over pairs of runs with equal seeds where every run has its partner."""
    own, other = _means(group, metric), _means(base, metric)
    if own.keys() == other.keys():
        return spread([_minus(value, other[seed]) for seed, value in own.items()])
    return Cell(_minus(spread(list(own.values())).mean, spread(list(other.values())).mean), n=len(own))


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _find(groups: Sequence[Group], baseline: str) -> Group:
    found = [group for group in groups if group.label == baseline]
    found = found or [group for group in groups if group.first["method"] == baseline]
    if len(found) != 1:
        labels = ", ".join(repr(group.label) for group in groups)
        raise ValueError(f"baseline {baseline!r} names {len(found)} rows: give one of {labels}")
    return found[0]
