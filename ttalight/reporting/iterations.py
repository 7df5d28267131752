"""Accuracy against adaptation steps, from the readings of one run."""

from __future__ import annotations

from typing import NamedTuple

from ttalight.errors import InputError
from ttalight.reporting.results import Results
from ttalight.reporting.summary import counted

__all__ = ["IterationCurves", "has_iterations", "iteration_curves"]


class IterationCurves(NamedTuple):
    """Accuracy after so many steps.

    Args:
        steps: Numbers of steps, rising; the last is that of the whole run.
        domains: Domain -> accuracy in [0, 1] after each of them, None where it is missing; the mean over visits.
        mean: Mean over the rows of the run.
    """

    steps: list[int]
    domains: dict[str, list[float | None]]
    mean: list[float | None]


def has_iterations(results: Results) -> bool:
    """Return whether a run has predictions after fewer steps."""
    return bool(results.get("readings")) and results["protocol"]["steps"] is not None


def iteration_curves(results: Results) -> IterationCurves:
    """Return how accuracy grows with the number of steps on each batch.

    Args:
        results: Results of a run with ``read_at``.

    Raises:
        ValueError: If the run has no readings.
    """
    readings, last = results.get("readings"), results["protocol"]["steps"]
    if not readings or last is None:
        raise InputError(
            f"the run of {results['method']} has no predictions after fewer steps: run it with read_at "
            "(--adapter.read_at [0,1,5]) and reset: batch"
        )
    steps = [*(reading["steps"] for reading in readings), last]
    tables = [*(reading["domains"] for reading in readings), results["domains"]]
    domains: dict[str, list[float | None]] = {}
    for place, rows in enumerate(tables):
        found: dict[str, list[float | None]] = {}
        for row in counted(rows):
            found.setdefault(row["name"], []).append(row["accuracy"])
        for name, values in found.items():
            known = [value for value in values if value is not None]
            own = domains.setdefault(name, [None] * len(tables))
            own[place] = sum(known) / len(known) if len(known) == len(values) else None
    mean = [*(reading["mean"]["accuracy"] for reading in readings), results["mean"]["accuracy"]]
    return IterationCurves(steps, domains, mean)
