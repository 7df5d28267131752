"""Figures that belong to the tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttalight.analysis import can_embed, feature_panels, read_features, tsne_figure
from ttalight.reporting import read_results
from ttalight.reporting.figures import can_plot, iterations_figure, save_figure
from ttalight.reproduce.plan import Plan
from ttalight.reproduce.tables import PUBLISHED, accuracies, mean_of_corruptions, runs_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(plan: Plan, root: Path, done: set[str]) -> list[Path]:
    """Draw the figure that belongs to a table, where its runs are done and the packages for it installed."""
    jobs = {row.label: row.jobs[0] for row in plan.rows}
    figure: Any = None
    run = jobs.get("CTA", "")
    if plan.table == 1 and can_plot() and any(row.jobs[0] in done for row in plan.rows if row.temperature):
        name, run = "table1", plan.rows[-1].jobs[0]
        figure = temperature_figure(plan, root, done)
    elif plan.table in (2, 4, 5) and can_plot() and run in done:
        name = "figure3"
        control = jobs["aligned, EMABN"]
        figure = iterations_figure(read_results(root / run), read_results(root / control) if control in done else None)
    elif plan.table == 6 and can_plot() and can_embed() and {jobs["Y"], jobs["CTA"]} <= done:
        name = "figure2"
        models = {label: read_features(root / job) for label, job in jobs.items()}
        target = next(domain for domain in models["CTA"] if domain != "clean")
        smallest = min(len(own.labels) for domains in models.values() for own in domains.values())
        figure = tsne_figure(feature_panels(models, target=target), perplexity=min(30.0, (smallest - 1) / 3))
    if figure is None:
        return []
    from torch.utils.tensorboard import SummaryWriter

    save_figure(figure, root, name)
    with SummaryWriter(str(root / run)) as writer:
        writer.add_figure(name, figure)
    return [root / f"{name}.{kind}" for kind in ("png", "svg")]


def temperature_figure(plan: Plan, root: Path, done: set[str]) -> Figure:
    """Return the accuracies of Table 1 against the temperature of the alignment, measured beside published ones.

    Args:
        plan: The plan of Table 1.
        root: Folder of the runs.
        done: Names of the adaptation runs that are done.
    """
    from matplotlib.figure import Figure

    runs, published = runs_of(plan, root, done), PUBLISHED["table1"].get(plan.data, {})
    measured: dict[float | str, tuple[float, float]] = {}
    for row in plan.rows:
        for found in accuracies(runs[row.label]):
            measured[row.temperature or "supervised"] = 100 * found["clean"], 100 * mean_of_corruptions(found)
    figure = Figure(figsize=(9, 4), layout="constrained")
    for place, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("clean", "corrupted, mean"), strict=True)):
        for values, color, label in ((measured, "tab:blue", "here"), (published, "tab:gray", "published")):
            points = sorted((at, value[place]) for at, value in values.items() if at != "supervised")
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=label)
            if "supervised" in values:
                axes.axhline(values["supervised"][place], color=color, linestyle="--", label=f"supervised, {label}")
        axes.set_xscale("log")
        axes.set_xlabel("temperature of the alignment")
        axes.set_ylabel("accuracy in %")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
