"""Logging of an evaluation."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ttalight.adapters import Adapter
from ttalight.callbacks.measurement import Batch
from ttalight.reporting import Results, by_domain, domain_table, protocol_header
from ttalight.reporting.figures import can_plot, domain_figure, iterations_figure
from ttalight.reporting.iterations import has_iterations
from ttalight.reporting.results import DomainResult, Measure
from ttalight.reporting.text import plain

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
    """Log the accuracy of each domain, the table, hyperparameters, and where matplotlib is installed figures.

    All domains are one group of tags, ``domains/<name>``. TensorBoard's HPARAMS compares runs by their method and
    settings, with the mean accuracy.

    Args:
        trainer: Has the loggers.
        results: The results of the run.
    """
    rows = by_domain(results["domains"])
    for logger in trainer.loggers:
        for index, row in enumerate(rows):
            logger.log_metrics(_domain_values(row), step=index)
        if isinstance(logger, TensorBoardLogger):
            _log_hyperparams(logger, results)
        experiment: Any = getattr(logger, "experiment", None)
        if callable(getattr(experiment, "add_text", None)):
            table = f"{protocol_header(results)}\n{domain_table(results)}"
            experiment.add_text("results", "\n".join(f"    {line}" for line in table.splitlines()))
        if callable(getattr(experiment, "add_figure", None)) and can_plot():
            experiment.add_figure("domains", domain_figure(results))
            if has_iterations(results):
                experiment.add_figure("steps", iterations_figure(results))


def _domain_values(row: DomainResult) -> dict[str, float]:
    """Return the accuracy of a domain; without labels, what else is known of its predictions."""
    tag = f"domains/{row['name']}"
    if row["accuracy"] is not None:
        return {tag: row["accuracy"]}
    names: tuple[Measure, ...] = ("agreement", "entropy", "diversity")
    return {f"{tag}/{name}": row.get(name) or 0.0 for name in names}


def _log_hyperparams(logger: TensorBoardLogger, results: Results) -> None:
    """Log the same settings for every run, since TensorBoard takes the columns of all runs from one of them.

    They are five, since it shows no more unless asked to.
    """
    name = "accuracy" if results["mean"]["accuracy"] is not None else "agreement"
    value = results["mean"].get(name)
    if not isinstance(value, float):
        return
    protocol = results["protocol"]
    settings: dict[str, Any] = {
        "method": results["method"],
        # A setting that a method does not have is 0: a column of numbers takes no words.
        "lr": float(protocol["lr"] or 0),
        "steps": float(protocol["steps"] or 0),
        "reset": plain(protocol["reset"]) or "none",
        "seed": float(results["seed"] or 0),
    }
    logger.log_hyperparams(settings, {f"results/mean_{name}": value})


def flush_loggers(trainer: Trainer) -> None:
    """Make loggers write what they have."""
    for logger in trainer.loggers:
        logger.save()
        flush = getattr(getattr(logger, "experiment", None), "flush", None)
        if callable(flush):
            flush()
