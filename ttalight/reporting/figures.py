"""Figures of one run; they need matplotlib, which the ``plots`` extra brings."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ttalight.reporting.overview import by_domain
from ttalight.reporting.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["can_plot", "domain_figure"]


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def domain_figure(results: Results) -> Figure:
    """Return a bar chart of the accuracy of every row, or domain where rows are very many, with the mean as a line.

    Args:
        results: The results of a run.
    """
    from matplotlib.figure import Figure

    rows = by_domain(results["domains"])
    figure = Figure(figsize=(2 + 0.6 * len(rows), 4), layout="constrained")
    axes = figure.subplots()
    accuracy = [100 * (row["accuracy"] or 0.0) for row in rows]
    axes.bar(range(len(rows)), accuracy, color="tab:blue")
    if results["mean"]["accuracy"] is not None:
        axes.axhline(100 * results["mean"]["accuracy"], color="tab:gray", linestyle="--", label="mean")
        axes.legend()
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=60, ha="right")
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy in %")
    axes.set_title(results["method"])
    return figure
