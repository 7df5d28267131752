"""The base class of monitors, for networks that ``wrap`` returned and for Lightning's runs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ttalight.arguments import CheckedArguments
from ttalight.engine import Engine

__all__ = ["LateReads", "Monitoring", "engine_of", "log_values"]


class Monitoring(CheckedArguments, Callback):
    """Sees every batch that a model adapts to.

    ``adapted.watch(monitor)`` attaches it to a network that ``wrap`` returned. Among the callbacks of a Trainer it
    attaches itself to the adapter of the run, and logs what it finds as curves. Batches of a probe are left out. Its
    state belongs to one network or run, and is not in checkpoints: a resumed run begins again.
    """

    def attach(self, engine: Engine) -> None:
        """Begin to see the batches of an engine."""
        if any(observer is self for observer in engine.observers):
            return
        engine.observers.append(self)
        self.begin(engine)

    def begin(self, engine: Engine) -> None:
        """Prepare for a network, before its next batch."""

    def observe(self, engine: Engine, logits: Tensor) -> None:
        """See a batch, unless it is of a probe."""
        if engine.before_probe is None:
            with torch.no_grad():
                self.see(engine, logits)

    @abstractmethod
    def see(self, engine: Engine, logits: Tensor) -> None:
        """See a batch; see ``Observer``."""

    def curves(self) -> dict[str, float]:
        """Return the numbers that a run logs after each batch, by name."""
        return {}

    # -- Lightning

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Attach to the adapter of the run with its first batch."""
        engine = engine_of(trainer)
        if engine is not None:
            self.attach(engine)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log curves."""
        engine = engine_of(trainer)
        if engine is not None:
            log_values(trainer, self.curves(), engine.batches)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end


class LateReads:
    """Numbers of a batch that are read when the next batch has been adapted to, so that the host waits for nothing."""

    def __init__(self) -> None:
        self._values: Tensor | None = None

    def exchange(self, values: Tensor) -> list[float] | None:
        """Keep the numbers of this batch, (N,), and return those of the batch before, None with the first."""
        before, copy = self._values, values.detach()
        if values.is_cuda:
            # The read of the next batch's step is behind this copy on the same stream, and waits for it.
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        self._values = copy
        return None if before is None else before.tolist()


def engine_of(trainer: Trainer) -> Engine | None:
    """Return the engine of the adapter among a trainer's callbacks; None if there is none, or it does not run."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = (getattr(callback, "engine", None) for callback in callbacks)
    return next((engine for engine in found if isinstance(engine, Engine)), None)


def log_values(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Log numbers to all loggers of a trainer.

    Args:
        trainer: The trainer.
        values: The numbers by name. If there are none, nothing is logged.
        step: Number of the batch.
    """
    for logger in trainer.loggers if values else ():
        logger.log_metrics(values, step=step)
