"""Reports on a model that adapts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ttalight.engine import Engine
from ttalight.monitoring.passes import adapted_outputs, source_outputs
from ttalight.monitoring.prometheus import Metric, exposition
from ttalight.monitoring.signals import flat_predictions, prediction_sums, relative_distance, shannon

__all__ = ["Report", "distances", "report_of"]

#: Name -> what it is, for people and for Prometheus. Counters end with ``_total`` there.
_HELP = {
    "batches": "Batches adapted to",
    "updates": "Steps that moved weights",
    "skipped": "Steps that moved nothing",
    "bad_batches": "Batches with invalid pixels, type or size",
    "missed": "Batches that a schedule did not adapt to, only predicted",
    "recoveries": "Returns to the source on the method's, the engine's or a watch's decision",
    "images": "Images of the last batches, which the following is measured on",
    "classes": "Classes that the classifier has",
    "entropy": "Mean entropy of a prediction, in nats",
    "commonest_class": "Class that most images are predicted as",
    "commonest_share": "Share of the images predicted as the commonest class",
    "diversity": "Entropy of the mean prediction, in nats",
    "effective_classes": "Exponential of the diversity: effective number of predicted classes",
    "seconds": "Mean time of a batch, in seconds",
    "weight_distance": "Distance of the adapted weights from the source, relative to its norm",
    "statistics_distance": "Distance of the running statistics from the source, relative to its norm",
    "source_agreement": "Share of the given images that the source model predicts alike",
}
_COUNTERS = ("batches", "updates", "skipped", "bad_batches", "missed", "recoveries")


@dataclass(frozen=True, repr=False)
class Report(Mapping[str, Any]):
    """Report on a model that adapts, without labels: plain numbers, and a mapping of their names to them.

    Counts are since the network was wrapped, or the run began. The numbers from ``images`` to ``seconds`` are of the
    last batches: of up to 1,000 images, fewer where there are many classes, and of dense predictions every eighth pixel
    of a row and of a column. A number is None where it does not exist: before the first batch, for methods that move no
    weights or no statistics, and for ``source_agreement`` where no images were given.

    Args:
        method: Name of the method.
        batches: Batches adapted to.
        updates: Steps that moved weights.
        skipped: Steps that moved nothing.
        bad_batches: Batches with invalid pixels, type or size.
        missed: Batches that a schedule or a clock did not adapt to, only predicted.
        recoveries: Returns to the source that the stream did not announce.
        images: Number of images of the last batches.
        classes: Number of classes.
        entropy: Mean entropy of a prediction in nats, between 0 and ln C.
        commonest_class: The class that most images are predicted as.
        commonest_share: The share of the images predicted as it.
        diversity: Entropy of the mean prediction in nats, between 0 and ln C.
        effective_classes: Its exponential, between 1 and C.
        seconds: Mean time of a batch.
        weight_distance: Euclidean distance of the adapted weights from the source, divided by the source's norm.
        statistics_distance: The same of running statistics, where the method moves them.
        source_agreement: Share of the given images that the source model predicts alike.
        passes: Ways that passes are computed in, where ``FastPass`` has chosen them.
    """

    method: str
    batches: int
    updates: int
    skipped: int
    bad_batches: int
    recoveries: int
    missed: int = 0
    images: int = 0
    classes: int | None = None
    entropy: float | None = None
    commonest_class: int | None = None
    commonest_share: float | None = None
    diversity: float | None = None
    effective_classes: float | None = None
    seconds: float | None = None
    weight_distance: float | None = None
    statistics_distance: float | None = None
    source_agreement: float | None = None
    passes: str | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in _NAMES:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)

    def __repr__(self) -> str:
        lines = [f"{name.replace('_', ' '):20}{_shown(self[name])}" for name in self if self[name] is not None]
        return "\n".join(lines)

    def curves(self) -> dict[str, float]:
        """Return the numbers that change from batch to batch, for a logger."""
        left_out = ("method", "batches", "classes", "commonest_class", "passes")
        return {name: float(value) for name, value in self.items() if name not in left_out and value is not None}

    def prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """Return the numbers in the text exposition format of Prometheus.

        Args:
            labels: Labels of every sample in addition to the method's name, such as ``{"model": "v3"}``.
        """
        metrics = []
        for name, text in _HELP.items():
            if self[name] is not None:
                counts = name in _COUNTERS
                full = f"ttalight_{name}_total" if counts else f"ttalight_{name}"
                metrics.append(Metric(full, "counter" if counts else "gauge", text, self[name]))
        return exposition(metrics, {"method": self.method, **(labels or {})})


_NAMES = tuple(field.name for field in fields(Report))


def report_of(engine: Engine, images: Tensor | None = None) -> Report:
    """Return the report of an engine: one read from the device, and no pass of the network unless images are given.

    Args:
        engine: The engine.
        images: A sample, (B, 3, H, W), to compare with the source model on: two passes, which change nothing.
    """
    counters, logits = engine.net.counters, engine.recent.logits
    moved = distances(engine)
    values = dict(moved)
    if images is not None:
        images = images.to(engine.net.device)
        adapted, source = (outputs(engine, images).logits.argmax(1) for outputs in (adapted_outputs, source_outputs))
        values["source_agreement"] = (adapted == source).float().mean()
        engine.net.clear_cache()
    if logits is not None:
        rows = flat_predictions(logits)
        values |= _of_predictions(rows)
    names, read = list(values), list(values.values())
    seen = dict(zip(names, torch.stack([value.double() for value in read]).tolist(), strict=True)) if read else {}
    found: dict[str, Any] = dict(seen)
    if logits is not None:
        found |= {
            "images": len(logits),
            "classes": rows.shape[1],
            "commonest_class": int(seen["commonest_class"]),
            "effective_classes": math.exp(seen["diversity"]),
            "seconds": engine.recent.seconds,
        }
    counts = {name: getattr(counters, name) for name in _COUNTERS}
    ways = {} if engine.method.passes is None else engine.method.passes.capture()
    found["passes"] = ", ".join(dict.fromkeys(way for way, _ in ways.values())) or None
    return Report(method=type(engine.method).__name__, **counts, **found)


def distances(engine: Engine) -> dict[str, Tensor]:
    """Return how far weights and running statistics are from the source, scalars on the device; see ``Report``."""
    net, state = engine.net, engine.state
    found: dict[str, Tensor] = {}
    if state is None:
        return found
    count = len(net.parameters)
    live, source = list(state.live.values()), list(state.source.values())
    if count:
        found["weight_distance"] = relative_distance(live[:count], source[:count])
    places = [i for i, name in enumerate(state.live) if ".statistics." in name and live[i].is_floating_point()]
    if places:
        found["statistics_distance"] = relative_distance([live[i] for i in places], [source[i] for i in places])
    return found


def _of_predictions(rows: Tensor) -> dict[str, Tensor]:
    sums, classes = prediction_sums(rows), rows.shape[1]
    counts = sums[1 : 1 + classes]
    return {
        "entropy": sums[0] / len(rows),
        "commonest_class": counts.argmax(),
        "commonest_share": counts.max() / len(rows),
        "diversity": shannon(sums[1 + classes :]),
    }


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
