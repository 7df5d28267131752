"""Logging of an evaluation."""

from __future__ import annotations

from typing import Any

from lightning import Trainer

from ttalight.adapters import Adapter
from ttalight.callbacks.measurement import Batch
from ttalight.reporting import Results, by_domain, domain_table, protocol_header
from ttalight.reporting.figures import can_plot, domain_figure, iterations_figure
from ttalight.reporting.iterations import has_iterations
from ttalight.reporting.results import Measure

__all__ = ["flush_loggers", "log_batch", "log_results"]


def log_batch(trainer: Trainer, adapter: Adapter | None, batch: Batch, step: int) -> None:
    """Log online accuracy and entropy, and what the adapter's last step showed.

    Args:
        trainer: Has the loggers.
        adapter: The method, if there is one.
        batch: The batch.
        step: Number of the batch in the stream, from 1.
    """
    values = {"online/entropy": float(batch.entropy.mean())}
    if batch.labelled:
        values["online/accuracy"] = float(batch.accuracy.mean())
    if adapter is not None and adapter.engine is not None:
        values |= {f"adapt/{name}": value for name, value in adapter.engine.last.items()}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


def log_results(trainer: Trainer, results: Results) -> None:
    """Log the accuracy of each domain, the table, and where matplotlib is installed figures.

    Args:
        trainer: Has the loggers.
        results: The results of the run.
    """
    rows = by_domain(results["domains"])
    for logger in trainer.loggers:
        for index, row in enumerate(rows):
            names: tuple[Measure, ...] = ("agreement", "entropy", "diversity")
            names = names if row["accuracy"] is None else ("accuracy",)
            values = {f"{row['name']}/{name}": row.get(name) or 0.0 for name in names}
            logger.log_metrics(values, step=index)
        experiment: Any = getattr(logger, "experiment", None)
        if callable(getattr(experiment, "add_text", None)):
            table = f"{protocol_header(results)}\n{domain_table(results)}"
            experiment.add_text("results", "\n".join(f"    {line}" for line in table.splitlines()))
        if callable(getattr(experiment, "add_figure", None)) and can_plot():
            experiment.add_figure("domains", domain_figure(results))
            if has_iterations(results):
                experiment.add_figure("steps", iterations_figure(results))


def flush_loggers(trainer: Trainer) -> None:
    """Make loggers write what they have."""
    for logger in trainer.loggers:
        logger.save()
        flush = getattr(getattr(logger, "experiment", None), "flush", None)
        if callable(flush):
            flush()
