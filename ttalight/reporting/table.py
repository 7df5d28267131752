"""The numbers of a comparison: methods in rows, domains in columns, seeds in a cell."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ttalight.errors import InputError
from ttalight.reporting.bootstrap import gain_interval
from ttalight.reporting.groups import Group, Run
from ttalight.reporting.names import column_names
from ttalight.reporting.predictions import PREDICTIONS
from ttalight.reporting.results import Metric
from ttalight.reporting.summary import counted
from ttalight.reporting.text import csv_text

#: Deviations below this are no deviations: differences of equal numbers are not always equal.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Cell:
    """A measure over ``n`` runs: mean and sample standard deviation, None where they do not exist."""

    mean: float | None = None
    std: float | None = None
    n: int = 0

    @property
    def equal(self) -> bool:
        """Whether several runs gave the same value, but for the rounding of a difference."""
        return self.std is not None and self.std < _ROUNDING


@dataclass(frozen=True)
class Row:
    """The numbers of one group of runs in each domain and on average.

    ``mean`` counts domains once, ``weighted`` images. ``rank`` is the place among all finished rows, averaged over
    domains. ``gain`` is the difference to the baseline, ``interval`` its bootstrap interval.
    """

    group: Group
    domains: tuple[Cell, ...]
    mean: Cell
    weighted: Cell
    rank: float | None
    gain: Cell | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Table:
    """Rows of equal length; ``domains`` maps (name, severity) to the name of a column.

    ``remarks`` say why a row has no interval.
    """

    metric: Metric
    domains: dict[tuple[str, int | None], str]
    baseline: str | None
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """The number that values are shown times: 100 for fractions, which are shown in percent."""
        return 1.0 if self.metric in ("nll", "brier") else 100.0

    @property
    def has_intervals(self) -> bool:
        """Whether a row has an interval."""
        return any(row.interval is not None for row in self.rows)


#: Measures of which more is better.
RISING = ("accuracy", "top5", "miou")


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
    domains = column_names([row for group in groups for run in group.runs for row in counted(run.results["domains"])])
    base = _find(groups, baseline) if baseline is not None else None
    cells = [_domain_cells(group, domains, metric) for group in groups]
    places = ranks(cells, [group.complete for group in groups], metric in RISING)
    intervals, remarks = _intervals(groups, base, metric)
    rows = [
        Row(
            group=group,
            domains=own,
            mean=spread(list(_means(group, metric).values())),
            weighted=spread(list(_means(group, metric, "weighted_mean").values())),
            rank=place,
            gain=_gain(group, base, metric) if base else None,
            interval=interval,
        )
        for group, own, place, interval in zip(groups, cells, places, intervals, strict=True)
    ]
    return Table(metric, domains, base.label if base else None, tuple(rows), tuple(remarks))


def ranks(cells: Sequence[Sequence[Cell]], complete: Sequence[bool], rising: bool) -> list[float | None]:
    """Average over domains the place that each row takes in it, from 1 for the best; ties share their places.

    Args:
        cells: For every row, its domains.
        complete: Which rows are finished; the others have no rank.
        rising: Whether more is better.

    Returns:
        One rank a row; None for all if fewer than two rows are finished or no domain has a value in each of them.
    """
    whole = [row for row, finished in zip(cells, complete, strict=True) if finished]
    columns = [[cell.mean for cell in column] for column in zip(*whole, strict=True)]
    usable = [[float(value) for value in column if value is not None] for column in columns if None not in column]
    if len(whole) < 2 or not usable:
        return [None] * len(cells)
    places = [[_place(value, column, rising) for value in column] for column in usable]
    means = iter([statistics.fmean(row) for row in zip(*places, strict=True)])
    return [next(means) if finished else None for finished in complete]


def _place(value: float, column: Sequence[float], rising: bool) -> float:
    better = sum(other > value if rising else other < value for other in column)
    return better + (column.count(value) + 1) / 2


def _intervals(
    groups: Sequence[Group], base: Group | None, metric: Metric
) -> tuple[list[tuple[float, float] | None], list[str]]:
    """Return the interval of every row's gain, and why there is none."""
    found: list[tuple[float, float] | None] = [None] * len(groups)
    if base is None or metric not in ("accuracy", "error"):
        return found, []
    reasons: dict[str, list[str]] = {}
    for index, group in enumerate(groups):
        if group is base or not (group.complete and base.complete):
            continue
        try:
            low, high = gain_interval(group.runs, base.runs)
            found[index] = (low, high) if metric == "accuracy" else (-high, -low)
        except FileNotFoundError:
            reasons.setdefault(f"no {PREDICTIONS}; --predictions true writes it", []).append(group.label)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(group.label)
    return found, [f"no interval for {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def table_csv(table: Table) -> str:
    """Write one line for each row and domain, and one for its mean, with values as measured: fractions and nats.

    Args:
        table: The table.

    Returns:
        CSV with columns label, method, domain, severity, metric, mean, std (empty for one seed), n, low and high; the
        last two are the ends of the interval of the line ``gain``. Ranks are lines of the metric ``rank``. Names are
        written as by `csv_text`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "method", "domain", "severity", "metric", "mean", "std", "n", "low", "high"])
    for row in table.rows:
        places = [*zip(table.domains, row.domains, strict=True), (("mean", None), row.mean)]
        places += [(("weighted_mean", None), row.weighted), (("gain", None), row.gain or Cell())]
        start = [csv_text(row.group.label), csv_text(row.group.first["method"])]
        for (name, severity), cell in places:
            if cell.n:
                ends = row.interval or () if name == "gain" else ()
                ends = (*ends, "", "")[:2]
                writer.writerow([*start, csv_text(name), severity, table.metric, cell.mean, cell.std, cell.n, *ends])
        if row.rank is not None:
            writer.writerow([*start, "mean", None, "rank", row.rank, None, len(row.group.runs), "", ""])
    return text.getvalue()


def _domain_cells(group: Group, domains: Iterable[tuple[str, int | None]], metric: Metric) -> tuple[Cell, ...]:
    """Return the cell of every domain: over the runs that visited it, each with the mean of its visits."""
    runs = [_values_by_domain(run, metric) for run in group.runs]
    return tuple(spread([spread(values[place]).mean for values in runs if place in values]) for place in domains)


def _values_by_domain(run: Run, metric: Metric) -> dict[tuple[str, int | None], list[float | None]]:
    values: dict[tuple[str, int | None], list[float | None]] = {}
    for row in counted(run.results["domains"]):
        values.setdefault((row["name"], row["severity"]), []).append(row.get(metric))
    return values


def _means(
    group: Group, metric: Metric, kind: Literal["mean", "weighted_mean"] = "mean"
) -> dict[tuple[int | None, str | None], float | None]:
    """Mean over domains of each run by its key; nothing for a run that has not seen all of them."""
    values = [run.results[kind].get(metric) for run in group.runs]
    return dict(zip(group.keys, values, strict=True)) if group.complete else {}


def _gain(group: Group, base: Group, metric: Metric) -> Cell:
    """Difference of means; over pairs of runs with equal seeds and streams where every run has its partner."""
    own, other = _means(group, metric), _means(base, metric)
    if own.keys() == other.keys():
        return spread([_minus(value, other[key]) for key, value in own.items()])
    return Cell(_minus(spread(list(own.values())).mean, spread(list(other.values())).mean), n=len(own))


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _find(groups: Sequence[Group], baseline: str) -> Group:
    found = [group for group in groups if group.label == baseline]
    found = found or [group for group in groups if group.first["method"] == baseline]
    if len(found) != 1:
        labels = ", ".join(repr(group.label) for group in groups)
        raise InputError(f"baseline {baseline!r} names {len(found)} rows: give one of {labels}")
    return found[0]
