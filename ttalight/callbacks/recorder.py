"""Measures an evaluation and keeps its result file up to date."""

from __future__ import annotations

import platform
import time
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

import ttalight
from ttalight.adapters import Adapter
from ttalight.data.stream import Domain, Stream, Visit
from ttalight.losses import entropy
from ttalight.metrics import StreamingClassification
from ttalight.models.network import logits_of
from ttalight.reporting import Reading, Results, Source, domain_table, protocol_header, summarize, write_results
from ttalight.reporting.figures import can_plot, domain_figure
from ttalight.seeding import global_seed

__all__ = ["Recorder"]


class Recorder(Callback):
    """Records what a module predicts during ``test`` and ``validate``, ours or a stranger's, adapted or not.

    It reads the logits that ``self(images)`` returns inside the step and the labels of the batch, ``(image, label)``.
    One row a visit of the stream; without a stream, one a data loader. After every visit ``results.json`` and
    ``domains.csv`` are written to the run's folder, and loggers get online accuracy and entropy a batch, the
    adapter's loss, gradient norm and fraction of kept samples, and each domain's accuracy.

    Args:
        folder: Where the result files go; the trainer's log directory by default, none if it has none.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        #: The results of the last evaluation.
        self.results: Results | None = None
        #: What a progress bar may show: the domain and the running accuracy in it.
        self.status: dict[str, str] = {}
        self._active = False
        self._hook: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Be inert inside fit."""
        self._active = stage in ("test", "validate")

    # -- one evaluation

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._active:
            return
        self.results, self.status = None, {}
        self._stream: Stream | None = getattr(getattr(trainer, "datamodule", None), "stream", None)
        if trainer.validating:
            self._stream = None
        self._metrics: dict[int, StreamingClassification] = {}
        self._readings: dict[int, dict[int, StreamingClassification]] = {}
        self._seconds: dict[int, float] = {}
        self._batches, self._batch_size, self._visit = 0, 0, -1
        self._logits: Tensor | None = None
        self._hook = module.register_forward_hook(self._see)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._logits = logits_of(output)

    def _batch_start(self) -> None:
        self._logits = None
        self._began = time.perf_counter()

    def _batch_end(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, loader: int) -> None:
        if not self._active:
            return
        labels = _labels(batch)
        if self._logits is None:
            raise RuntimeError(
                f"the step of {type(module).__name__} does not call self(images), so its predictions cannot be "
                "recorded: let it call self(images), or remove the Recorder from the callbacks"
            )
        logits = self._logits.detach()
        visits = self._visits(batch_idx, loader, len(labels))
        for visit in np.unique(visits).tolist():
            where = slice(None) if (visits == visit).all() else torch.from_numpy(visits == visit).to(logits.device)
            _metric(self._metrics, visit, logits).update(logits[where], labels[where])
            for steps, read in self._read(trainer).items():
                _metric(self._readings.setdefault(steps, {}), visit, read).update(read[where], labels[where])
        online = torch.stack([(logits.argmax(1) == labels).float().mean(), entropy(logits).mean()]).tolist()
        self._note_time(visits, time.perf_counter() - self._began)
        self._batches += 1
        self._batch_size = max(self._batch_size, len(labels))
        self._log_batch(trainer, dict(zip(("online/accuracy", "online/entropy"), online, strict=True)))
        self._progress(trainer, int(visits[-1]))

    def _read(self, trainer: Trainer) -> dict[int, Tensor]:
        """Return the adapter's predictions after fewer steps."""
        adapter = _adapter(trainer)
        return adapter.engine.net.readings if adapter is not None and adapter.engine is not None else {}

    def _visits(self, batch_idx: int, loader: int, size: int) -> np.ndarray:
        """Return, for every sample of a batch, the visit it belongs to."""
        if self._stream is None:
            return np.full(size, loader)
        return self._stream.visit[self._stream.batch(batch_idx)].astype(np.int64)

    def _note_time(self, visits: np.ndarray, seconds: float) -> None:
        for visit, count in zip(*np.unique(visits, return_counts=True), strict=True):
            self._seconds[int(visit)] = self._seconds.get(int(visit), 0.0) + seconds * count / len(visits)

    def _progress(self, trainer: Trainer, visit: int) -> None:
        if visit != self._visit and self._visit >= 0:
            self._write(trainer, complete=False, without=visit)
        self._visit = visit
        domain, _ = self._place(visit)
        metric = self._metrics[visit]
        self.status = {"domain": domain.name, "accuracy": f"{float(metric.correct) / max(1, int(metric.samples)):.3f}"}

    def _stop(self, trainer: Trainer) -> None:
        if self._active and self._hook is not None:
            self._write(trainer, complete=True)
            self._log_results(trainer)

    # -- results

    def _place(self, visit: int) -> tuple[Domain, Visit]:
        if self._stream is None:
            return Domain(f"loader_{visit}" if len(self._metrics) > 1 else "all"), Visit(visit)
        return self._stream.domains[self._stream.visits[visit].domain], self._stream.visits[visit]

    def _rows(self, metrics: dict[int, StreamingClassification], without: int | None, timed: bool = True) -> list[Any]:
        rows = []
        for visit in sorted(metrics.keys() - {without}):
            domain, place = self._place(visit)
            measured = metrics[visit].compute()
            seconds = self._seconds[visit] if timed else None
            rows.append(
                {
                    "name": domain.name,
                    "severity": domain.severity,
                    "visit": place.number,
                    **{key: measured[key] for key in ("samples", "accuracy", "error", "top5", "nll", "ece")},
                    "seconds": seconds,
                    "images_per_second": measured["samples"] / seconds if seconds else None,
                }
            )
        return rows

    def _write(self, trainer: Trainer, complete: bool, without: int | None = None) -> None:
        rows = self._rows(self._metrics, without)
        mean, weighted_mean = summarize(rows)
        adapter = _adapter(trainer)
        source: Any = getattr(trainer.lightning_module, "source", None)
        results: Results = {
            "schema": 1,
            "complete": complete,
            "method": type(adapter).__name__ if adapter is not None else "Source",
            "model": type(trainer.lightning_module).__name__,
            "seed": global_seed(),
            "protocol": self._protocol(trainer, adapter, rows),
            "domains": rows,
            "mean": mean,
            "weighted_mean": weighted_mean,
            "cost": self._cost(adapter, rows),
            "source": cast(Source, source) if isinstance(source, dict) else {"file": None, "sha256": None},
            "environment": environment(trainer),
        }
        if self._readings:
            results["readings"] = [self._reading(steps, without) for steps in sorted(self._readings)]
        self.results = results
        folder = self.folder or trainer.log_dir
        if folder is not None and trainer.is_global_zero:
            write_results(folder, results)

    def _reading(self, steps: int, without: int | None) -> Reading:
        rows = self._rows(self._readings[steps], without, timed=False)
        return {"steps": steps, "domains": rows, "mean": summarize(rows)[0]}

    def _protocol(self, trainer: Trainer, adapter: Adapter | None, rows: list[Any]) -> Any:
        domains = self._stream.domains if self._stream is not None else ()
        severities = sorted({domain.severity for domain in domains if domain.severity})
        method = adapter.protocol() if adapter is not None else dict.fromkeys(_METHOD_FIELDS)
        order = getattr(getattr(trainer, "datamodule", None), "order", None)
        return {
            "stream": type(order).__name__ if self._stream is not None else None,
            "stream_hash": self._stream.hash if self._stream is not None else None,
            "severity": severities[0] if len(severities) == 1 else severities,
            "samples": len(self._stream) if self._stream is not None else sum(row["samples"] for row in rows),
            "batch_size": self._batch_size,
            "sharding": None,
            **method,
        }

    def _cost(self, adapter: Adapter | None, rows: list[Any]) -> Any:
        engine = adapter.engine if adapter is not None else None
        batches = max(1, self._batches)
        seconds = sum(self._seconds.values())
        return {
            "forwards_per_batch": engine.net.forwards / batches if engine is not None else 1.0,
            "backwards_per_batch": engine.backwards / batches if engine is not None else 0.0,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "images_per_second": sum(row["samples"] for row in rows) / seconds if rows and seconds else 0.0,
            "adapted_parameters": sum(p.numel() for p in engine.net.parameters) if engine is not None else 0,
        }

    # -- loggers

    def _log_batch(self, trainer: Trainer, values: dict[str, float]) -> None:
        adapter = _adapter(trainer)
        if adapter is not None and adapter.engine is not None:
            values |= {f"adapt/{name}": value for name, value in adapter.engine.last.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._batches)

    def _log_results(self, trainer: Trainer) -> None:
        assert self.results is not None
        for logger in trainer.loggers:
            for index, row in enumerate(self.results["domains"]):
                logger.log_metrics({f"{row['name']}/accuracy": row["accuracy"] or 0.0}, step=index)
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if callable(add_text):
                table = f"{protocol_header(self.results)}\n{domain_table(self.results)}"
                add_text("results", "\n".join(f"    {line}" for line in table.splitlines()))
            add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if callable(add_figure) and can_plot():
                add_figure("domains", domain_figure(self.results))
            logger.save()

    # -- Lightning

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record."""
        self._start(trainer, pl_module)

    on_validation_start = on_test_start

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note when the batch began."""
        self._batch_start()

    on_validation_batch_start = on_test_batch_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the batch."""
        self._batch_end(trainer, pl_module, batch, batch_idx, dataloader_idx)

    on_validation_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results."""
        self._stop(trainer)

    on_validation_epoch_end = on_test_epoch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    on_validation_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look no longer."""
        self.on_test_end(trainer, pl_module)


_METHOD_FIELDS = ("reset", "prediction", "steps", "optimizer", "lr", "norm")


def environment(trainer: Trainer) -> dict[str, Any]:
    """Return what besides configuration and data a result may depend on."""
    device = trainer.strategy.root_device
    return {
        "ttalight": ttalight.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
    }


def _adapter(trainer: Trainer) -> Adapter | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, Adapter)), None)  # type: ignore[attr-defined]


def _metric(metrics: dict[int, StreamingClassification], visit: int, logits: Tensor) -> StreamingClassification:
    if visit not in metrics:
        metrics[visit] = StreamingClassification(logits.shape[1]).to(logits.device)
    return metrics[visit]


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise TypeError(
        f"the recorder reads batches (image, label), got {type(batch).__name__}: let the data loader yield such pairs, "
        "or remove the Recorder from the callbacks"
    )
