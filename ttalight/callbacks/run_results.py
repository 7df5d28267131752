"""The results of an evaluation, built from what was measured."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning
import torch
from lightning import Trainer

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.callbacks.measurement import Measurement
from ttalight.data import ImageDataModule
from ttalight.data.streams import StreamOrder
from ttalight.engine import Engine
from ttalight.reporting import Cost, Curve, DomainResult, Reading, Results, RunProtocol, Source, digest, summarize
from ttalight.reporting.shown import shown
from ttalight.seeding import global_seed
from ttalight.version import __version__

__all__ = ["Passes", "build_results", "environment", "source_of"]

_METHOD_FIELDS = ("reset", "prediction", "steps", "optimizer", "lr", "norm")


class Passes(NamedTuple):
    """Costs of the passes of an evaluation, summed over all processes."""

    forwards: float
    backwards: float
    seconds: float
    memory: int | None
    parameters: int
    bad_batches: int

    @classmethod
    def of(cls, engine: Engine | None, measurement: Measurement) -> Passes:
        """Return the costs of the passes of this process.

        Args:
            engine: The engine of the adapter, None without one.
            measurement: What was measured.
        """
        return cls(
            forwards=engine.net.forwards if engine is not None else float(measurement.batches),
            backwards=engine.backwards if engine is not None else 0.0,
            seconds=measurement.seconds,
            memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            parameters=sum(p.numel() for p in engine.net.parameters) if engine is not None else 0,
            bad_batches=engine.bad_batches if engine is not None else 0,
        )

    @classmethod
    def merged(cls, parts: Sequence[Passes]) -> Passes:
        """Return the costs of the passes of processes that ran side by side."""
        memory = [part.memory for part in parts if part.memory is not None]
        return cls(
            forwards=sum(part.forwards for part in parts),
            backwards=sum(part.backwards for part in parts),
            seconds=max(part.seconds for part in parts),
            memory=max(memory) if memory else None,
            parameters=max(part.parameters for part in parts),
            bad_batches=sum(part.bad_batches for part in parts),
        )

    def described(self, measurement: Measurement) -> Cost:
        """Return the costs a batch and the images a second."""
        batches = max(1, measurement.batches)
        return {
            "forwards_per_batch": self.forwards / batches,
            "backwards_per_batch": self.backwards / batches,
            "peak_memory_bytes": self.memory,
            "images_per_second": measurement.images / self.seconds if self.seconds else 0.0,
            "adapted_parameters": self.parameters,
        }


def build_results(
    trainer: Trainer,
    adapter: Adapter | None,
    measurement: Measurement,
    passes: Passes,
    complete: bool,
    source: Source | None = None,
) -> Results:
    """Return the results of an evaluation.

    Args:
        trainer: The trainer, with the module and the data.
        adapter: The method, None without one.
        measurement: What was measured.
        passes: What it took.
        complete: Whether nothing is missing.
        source: Where the weights come from; by default as the module says it.
    """
    module = trainer.lightning_module
    rows = measurement.rows()
    mean, weighted_mean = summarize(rows)
    results: Results = {
        "schema": 1,
        "complete": complete,
        "method": type(adapter).__name__ if adapter is not None else "Source",
        "model": type(module).__name__,
        "network": str(module.hparams.get("encoder", type(module).__name__)),
        "classes": measurement.classes,
        "seed": global_seed(),
        "protocol": _protocol(trainer, adapter, measurement, rows),
        "domains": rows,
        "mean": mean,
        "weighted_mean": weighted_mean,
        "curve": _curve(measurement, rows),
        "cost": passes.described(measurement),
        "source": source or source_of(module),
        "environment": environment(trainer),
    }
    overall = measurement.overall()
    if overall is not None:
        results["overall"] = overall
    if adapter is not None and adapter.engine is not None and adapter.on_bad_batch != "error":
        results["bad_batches"] = passes.bad_batches
    if adapter is not None and adapter.engine is not None and adapter.engine.schedules:
        results["missed_batches"], results["missed"] = len(measurement.missed), list(measurement.missed)
    if adapter is not None and adapter.engine is not None and adapter.passes is not None:
        results["passes"] = {kind: f"{way}: {reason}" for kind, (way, reason) in adapter.passes.capture().items()}
    if measurement.readings:
        results["readings"] = [_reading(measurement, steps) for steps in sorted(measurement.readings)]
    return shown({**results, **digest(rows)})


def source_of(module: Any) -> Source:
    """Return where a module says that its weights come from."""
    source = getattr(module, "source", None)
    known: Any = source if isinstance(source, dict) else {"file": None, "sha256": None}
    return {"file": known.get("file"), "sha256": known.get("sha256")}


def environment(trainer: Trainer) -> dict[str, Any]:
    """Return what besides configuration and data a result may depend on."""
    device = trainer.strategy.root_device
    return {
        "ttalight": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def _protocol(
    trainer: Trainer, adapter: Adapter | None, measurement: Measurement, rows: list[DomainResult]
) -> RunProtocol:
    stream, data = measurement.stream, getattr(trainer, "datamodule", None)
    severities = sorted({domain.severity for domain in stream.domains if domain.severity}) if stream is not None else []
    order: StreamOrder | None = getattr(data, "order", None) if stream is not None else None
    protocol: Any = {
        "stream": type(order).__name__ if order is not None else None,
        "stream_args": order.describe() if order is not None else {},
        "stream_hash": stream.hash if stream is not None else None,
        "severity": severities[0] if len(severities) == 1 else severities,
        "samples": len(stream) if stream is not None else sum(row["samples"] for row in rows),
        "batch_size": measurement.largest_batch,
        "sharding": adapter.shard if adapter is not None and trainer.world_size > 1 else None,
        **_data_protocol(data),
        **_module_protocol(trainer.lightning_module, "network_protocol"),
        **(
            _module_protocol(trainer.lightning_module, "adaptation_protocol")
            if isinstance(adapter, TestTimeTraining)
            else {}
        ),
        **(adapter.protocol() if adapter is not None else dict.fromkeys(_METHOD_FIELDS)),
    }
    whole: RunProtocol = protocol  # methods, tasks and data modules add keys of their own
    return whole


def _data_protocol(data: Any) -> dict[str, Any]:
    """Return what a data module says of itself, and its name: its ``dataset`` where that is one, else its class."""
    if data is None:
        return {}
    name = getattr(data, "dataset", None)
    described = getattr(data, "protocol", None) if isinstance(data, ImageDataModule) else None
    own = described() if callable(described) else {}
    return {"data": name if isinstance(name, str) else type(data).__name__, **own}


def _module_protocol(module: Any, name: str) -> dict[str, Any]:
    """Return what a module says of its network, or of the loss that it adapts by, where it says anything."""
    described = getattr(module, name, None)
    own: dict[str, Any] = described() if callable(described) else {}
    return own


def _curve(measurement: Measurement, rows: list[DomainResult]) -> Curve:
    """Return the accuracy along the stream, without values where images have no labels."""
    curve = measurement.curve.values()
    if any(row["accuracy"] is None for row in rows):
        unknown: list[float | None] = [None] * len(curve["images"])
        return {"images": curve["images"], "accuracy": unknown, "running": [*unknown]}
    return {"images": curve["images"], "accuracy": [*curve["accuracy"]], "running": [*curve["running"]]}


def _reading(measurement: Measurement, steps: int) -> Reading:
    rows = measurement.reading(steps)
    return {"steps": steps, "domains": rows, "mean": summarize(rows)[0]}
