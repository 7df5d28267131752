"""Figures of one run; they need matplotlib, which the ``plots`` extra brings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ttalight.errors import MissingPackageError
from ttalight.files.atomic import write_files
from ttalight.reporting.iterations import iteration_curves
from ttalight.reporting.overview import by_domain
from ttalight.reporting.results import Results
from ttalight.reporting.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["can_plot", "domain_figure", "iterations_figure", "require_matplotlib", "save_figure"]


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, where matplotlib is not."""
    if not can_plot():
        raise MissingPackageError("figures need matplotlib, which is not installed: pip install 'ttalight[plots]'")


def domain_figure(results: Results) -> Figure:
    """Return a bar chart of the accuracy of every row, or domain where rows are very many, with the mean as a line.

    Args:
        results: The results of a run.
    """
    from matplotlib.figure import Figure

    rows = by_domain(results["domains"])
    # 2 ** 16 pixels are matplotlib's limit, and so many names cannot be read.
    figure = Figure(figsize=(min(2 + 0.6 * len(rows), 40), 4), layout="constrained")
    axes = figure.subplots()
    accuracy = [100 * (row["accuracy"] or 0.0) for row in rows]
    axes.bar(range(len(rows)), accuracy, color="tab:blue")
    if results["mean"]["accuracy"] is not None:
        axes.axhline(100 * results["mean"]["accuracy"], color="tab:gray", linestyle="--", label="mean")
        axes.legend()
    axes.set_xticks(range(len(rows)), [_text(row["name"]) for row in rows], rotation=60, ha="right")
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy in %")
    axes.set_title(_text(results["method"]))
    return figure


def iterations_figure(results: Results, control: Results | None = None) -> Figure:
    """Return accuracy against adaptation steps: a line for each domain, their mean in black.

    Figure 3 of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv 2507.05221, from one
    run with ``read_at``.

    Args:
        results: The results of the run.
        control: Results on the same stream to show as dashed lines in the same colours, for example of ``EMABN``.

    Raises:
        ValueError: If a run has no readings.
        ImportError: If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    names: list[str] = []
    for run, style in ((results, "-"), (control, "--")):
        if run is None:
            continue
        steps, domains, mean = iteration_curves(run)
        for name, values in domains.items():
            names += [] if name in names else [name]
            label = _text(name) if run is results else None
            axes.plot(steps, _percent(values), style, color=colormaps["tab20"](names.index(name) % 20), label=label)
        axes.plot(steps, _percent(mean), style, color="black", linewidth=2, label=f"mean, {_text(run['method'])}")
    axes.set_xlabel("steps (dashed: forwards of the control)" if control is not None else "steps")
    axes.set_ylabel("accuracy in %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """Write a figure as ``<name>.png`` and ``<name>.svg``.

    Args:
        figure: The figure.
        folder: Where to write.
        name: Name without an ending.

    Raises:
        OSError: If the folder is not writable.
    """
    contents: dict[str, str | bytes] = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        # Without a date the same numbers give the same file.
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        contents[f"{name}.{kind}"] = buffer.getvalue()
    write_files(folder, contents)


def _text(text: str) -> str:
    """Write a name so that matplotlib takes no part of it for a formula."""
    return printable(text).replace("$", r"\$")


def _percent(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else 100 * value for value in values]
