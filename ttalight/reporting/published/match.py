"""Published rows that fit a run, and their differences from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttalight.reporting.groups import Group
from ttalight.reporting.names import short_names
from ttalight.reporting.published.rows import FIELDS, PublishedRow, published_rows
from ttalight.reporting.results import Metric
from ttalight.reporting.summary import counted
from ttalight.reporting.text import number, plain

__all__ = ["Match", "match_cells", "match_published"]

#: So many rows are set beside a run, those with the fewest known differences.
MOST = 3


@dataclass(frozen=True)
class Match:
    """A run and a published row of its method on its data.

    Args:
        group: The run, or runs that differ in the seed.
        row: The published row.
        domains: The domains that both have.
        differences: Setting -> the run's value and the published one.
        unstated: Settings that the source does not state.
    """

    group: Group
    row: PublishedRow
    domains: tuple[str, ...]
    differences: dict[str, tuple[str, str]]
    unstated: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the differences in a sentence."""
        parts = [f"{name} {own or 'none'} here, {other} there" for name, (own, other) in self.differences.items()]
        known = "differs in " + "; ".join(parts) if parts else "does not differ in what is stated"
        missing = f"; not stated: {', '.join(self.unstated)}" if self.unstated else ""
        return f"{self.group.label} against {self.row.label}, {self.row.source}: {known}{missing}"


def match_published(groups: Sequence[Group]) -> tuple[list[Match], list[str]]:
    """Find published rows of the same method and data set, with at least one domain in common.

    Args:
        groups: The runs.

    Returns:
        At most three rows for each group; and the labels of those for which there is none.
    """
    matches, without = [], []
    for group in groups:
        found = [match for row in published_rows() if (match := _match(group, row)) is not None]
        found.sort(key=lambda match: (-len(match.domains), len(match.differences), len(match.unstated)))
        matches += found[:MOST]
        without += [] if found else [group.label]
    return matches, without


def match_cells(matches: Sequence[Match], metric: Metric) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table that sets each run above its published rows, in percent on the domains of both.

    Args:
        matches: What to show.
        metric: ``accuracy`` or ``error``; anything else is shown as accuracy.
    """
    names = list(dict.fromkeys(name for match in matches for name in match.domains))
    error = metric == "error"

    def line(label: str, values: dict[str, float], mean: float | None) -> list[str]:
        shown = [values.get(name) for name in names]
        return [label, _percent(mean, error), *(_percent(value, error) for value in shown)]

    lines: list[list[str]] = []
    for match in matches:
        own = _own_accuracy(match.group)
        measured = {name: own[name] for name in match.domains}
        first = line(match.group.label, measured, statistics.fmean(measured.values()))
        lines += [] if first in lines else [first]
        published = {name: match.row.accuracy[name] for name in match.domains} if match.row.accuracy else {}
        mean = statistics.fmean(published.values()) if _only_part(match) else match.row.mean
        lines.append(line(match.row.short, published, mean))
    return [f"{'error' if error else 'accuracy'} in %", "mean", *short_names(names)], lines


def _only_part(match: Match) -> bool:
    """Whether the printed mean is over domains that the run does not have, so that another mean is needed."""
    return bool(match.row.accuracy) and len(match.domains) < len(match.row.domains)


def _percent(value: float | None, error: bool) -> str:
    return "-" if value is None else number(100 * (1 - value if error else value))


def _own_accuracy(group: Group) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in group.runs:
        for row in counted(run.results["domains"]):
            values.setdefault(row["name"], []).append(math.nan if row["accuracy"] is None else row["accuracy"])
    return {name: statistics.fmean(found) for name, found in values.items()}


def _match(group: Group, row: PublishedRow) -> Match | None:
    results = group.first
    fits = results["method"] == row.method and row.model in (None, results.get("model"))
    own = _own_accuracy(group)
    names = tuple(name for name in own if name in row.domains)
    if not (fits and results["protocol"].get("data") in row.data and names):
        return None
    settings = _settings(group)
    differences = {
        name: (plain(settings[name]), plain(value))
        for name, value in row.protocol.items()
        if not _equal(settings[name], value)
    }
    if not len(own) == len(names) == len(row.domains):
        differences["domains"] = (f"{len(own)} ({len(names)} of the published)", str(len(row.domains)))
    unstated = tuple(name for name in FIELDS if name not in row.protocol and settings[name] is not None)
    return Match(group, row, names, differences, unstated)


def _settings(group: Group) -> dict[str, Any]:
    """Return the run's value of every setting that published rows may state."""
    results = group.first
    own: dict[str, Any] = {name: results["protocol"].get(name) for name in FIELDS}
    sizes = {row["samples"] for row in counted(results["domains"])}
    own["samples"] = sizes.pop() if len(sizes) == 1 else sorted(sizes)
    return own | {"network": results.get("network"), "seeds": len(group.runs)}


def _equal(own: Any, other: Any) -> bool:
    if isinstance(own, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(own, other)
    return str(own).lower() == str(other).lower()
