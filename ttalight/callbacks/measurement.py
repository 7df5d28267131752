"""Measurements of one evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ttalight.data.streams import Domain, Stream, Visit
from ttalight.labels import UNLABELLED
from ttalight.losses import entropy
from ttalight.metrics import ClassificationValues, RunningCurve, VisitMetrics
from ttalight.metrics.functional import flatten_pixels
from ttalight.reporting import DomainResult, Overall

__all__ = ["Batch", "Measurement", "visit_starts"]

_Measures = TypeVar("_Measures", DomainResult, Overall)

#: Attributes of a measurement that are numbers, and those that have one for each visit.
_COUNTS = ("classes", "batches", "largest_batch", "unwritten", "_images", "_counted", "_loader")
_BY_VISIT = ("_seconds", "_seen", "_hits", "_starts", "_compared", "_agreed")


@dataclass(frozen=True)
class Batch:
    """The part of a batch that counts, as seen on the host, for every image.

    Args:
        position: Place in the stream, (B,).
        visit: Index of the visit, (B,).
        sample: Index within the image set of the domain, (B,).
        accuracy: 1 or 0, of a dense prediction the fraction of its pixels, (B,).
        entropy: Mean entropy of the prediction in nats, (B,).
        labelled: Whether there are labels; without, the accuracy is 0.
    """

    position: npt.NDArray[np.int64]
    visit: npt.NDArray[np.int64]
    sample: npt.NDArray[np.int64]
    accuracy: npt.NDArray[np.float64]
    entropy: npt.NDArray[np.float64]
    labelled: bool = True


class Measurement:
    """Measures predictions a visit of the stream, or a data loader where there is no stream.

    Args:
        stream: The stream that the batches come from.
        ignore_index: Label of pixels that do not count.
        share: Numbers of the batches that come, where other processes measure the others: visits then stay open, and
            ``merged`` puts the parts together.
    """

    def __init__(
        self, stream: Stream | None, ignore_index: int | None = None, share: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.stream = stream
        self.ignore_index = ignore_index
        self.share = share
        self.metrics = VisitMetrics(ignore_index)
        #: Predictions after fewer steps, by number of steps.
        self.readings: dict[int, VisitMetrics] = {}
        self.curve = RunningCurve()
        self.classes = self.batches = self.largest_batch = 0
        #: Of each batch: place of its first image, number of images, accuracy; where there is a share.
        self._log: list[tuple[int, int, float]] = []
        #: Visits closed since the results were last written. The writer resets it to 0.
        self.unwritten = 0
        self._seconds: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._hits: dict[int, float] = {}
        self._starts: dict[int, int] = {}
        #: Of each visit: images whose source prediction was computed, and those of them that kept it.
        self._compared: dict[int, int] = {}
        self._agreed: dict[int, float] = {}
        #: Numbers of the batches that a schedule let be predicted only, rising.
        self.missed: list[int] = []
        self._images = self._counted = self._loader = 0
        self._counts = stream.counts(share) if stream is not None else None
        self._domain = np.array([visit.domain for visit in stream.visits]) if stream is not None else None

    # -- batches

    def add(
        self, index: int, loader: int, logits: Tensor, labels: Tensor, readings: dict[int, Tensor], began: float
    ) -> Batch:
        """Add a batch; one host synchronisation, and another where a visit ends.

        Args:
            index: Number of the batch in its data loader.
            loader: Index of the data loader.
            logits: (B, C) or (B, C, H, W).
            labels: (B,) or (B, H, W).
            readings: Logits after fewer steps.
            began: When the batch began, by ``time.perf_counter``.

        Returns:
            What the host has seen of the images that count.
        """
        self.batches += 1
        self.largest_batch = max(self.largest_batch, len(labels))
        position, visit, sample = self._place(index, loader, len(labels))
        scored = self.scored(index)
        logits, labels = logits[scored], labels[scored]
        readings = {steps: read[scored] for steps, read in readings.items()}
        seen = _by_image(logits, labels, self.ignore_index)
        seconds = time.perf_counter() - began  # the device is done, and measuring has not begun
        batch = Batch(position, visit, sample, seen[0], seen[1], labelled=not seen[2].all())
        self.classes = logits.shape[1]
        visits = visit.tolist()
        self.metrics.update(visits, logits, labels)
        for steps, read in readings.items():
            self.readings.setdefault(steps, VisitMetrics(self.ignore_index)).update(visits, read, labels)
        self._note(batch, seconds)
        self._close_finished(batch)
        return batch

    def _place(self, index: int, loader: int, size: int) -> tuple[npt.NDArray[np.int64], ...]:
        if self.stream is None:
            position = np.arange(self._images, self._images + size)
            if loader != self._loader:
                self.close(self._loader)
                self._loader = loader
            return position, np.full(size, loader), position
        positions, scored = self.stream.batch(index), self.scored(index)
        return (
            np.arange(positions.start, positions.stop)[scored],
            self.stream.visit[positions][scored].astype(np.int64),
            self.stream.sample[positions][scored].astype(np.int64),
        )

    def _note(self, batch: Batch, seconds: float) -> None:
        self._images += len(batch.visit)
        for visit in dict.fromkeys(batch.visit.tolist()):
            own = batch.visit == visit
            self._starts.setdefault(visit, self._counted)
            self._seen[visit] = self._seen.get(visit, 0) + int(own.sum())
            self._hits[visit] = self._hits.get(visit, 0.0) + float(batch.accuracy[own].sum())
            self._seconds[visit] = self._seconds.get(visit, 0.0) + seconds * float(own.mean())
        if not self.place(int(batch.visit[0]))[1].probe:  # a batch is wholly a probe or not at all
            self.curve.add(len(batch.visit), float(batch.accuracy.mean()))
            self._counted += len(batch.visit)
            if self.share is not None:
                self._log.append((int(batch.position[0]), len(batch.visit), float(batch.accuracy.mean())))

    def _close_finished(self, batch: Batch) -> None:
        if self._counts is not None:
            visits = dict.fromkeys(batch.visit.tolist())
            finished = [visit for visit in visits if self._seen[visit] == self._counts[visit]]
            if self.share is None:
                self.close(*finished)
            else:
                self.unwritten += len(finished)

    def add_agreement(self, batch: Batch, agreed: npt.NDArray[np.float64]) -> None:
        """Add how many predictions are those of the source model.

        Args:
            batch: The batch, as ``add`` returned it.
            agreed: 1 or 0 for every image, of a dense prediction the fraction of its pixels, (B,).
        """
        for visit in dict.fromkeys(batch.visit.tolist()):
            own = batch.visit == visit
            self._compared[visit] = self._compared.get(visit, 0) + int(own.sum())
            self._agreed[visit] = self._agreed.get(visit, 0.0) + float(agreed[own].sum())

    # -- states

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that was measured: tensors and plain values only."""
        return {
            "metrics": self.metrics.state_dict(),
            "readings": {steps: metrics.state_dict() for steps, metrics in self.readings.items()},
            "curve": self.curve.state_dict(),
            "missed": list(self.missed),
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "visits": {name: dict(getattr(self, name)) for name in _BY_VISIT},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue from what ``state_dict()`` returned, with the sums on a device."""
        self.metrics.load_state_dict(state["metrics"], device)
        self.readings = {steps: VisitMetrics(self.ignore_index) for steps in state["readings"]}
        for steps, metrics in self.readings.items():
            metrics.load_state_dict(state["readings"][steps], device)
        self.curve.load_state_dict(state["curve"])
        self.missed = list(state["missed"])
        for name in _COUNTS:
            setattr(self, name, state["counts"][name])
        for name in _BY_VISIT:
            setattr(self, name, dict(state["visits"][name]))

    # -- parts of a stream that several processes measured

    def part(self) -> dict[str, Any]:
        """Return what ``merged`` needs of a process that measured its share: tensors and plain values only."""
        return {**self.state_dict(), "log": list(self._log), "seconds": self.seconds}

    @classmethod
    def merged(cls, stream: Stream, ignore_index: int | None, parts: Sequence[Mapping[str, Any]]) -> Measurement:
        """Return the measurement of one process that saw what several did; whole visits are closed.

        Args:
            stream: The stream.
            ignore_index: Label of pixels that do not count.
            parts: What ``part()`` of each process returned.
        """
        whole = cls(stream, ignore_index)
        for part in parts:
            whole._add(part)
        for _, images, accuracy in sorted(entry for part in parts for entry in part["log"]):
            whole.curve.add(images, accuracy)
        whole._starts = {visit: start for visit, start in visit_starts(stream).items() if visit in whole._seen}
        counts = stream.counts()
        finished = {visit for visit, seen in whole._seen.items() if seen == counts[visit]}
        backwards, last = np.unique(stream.visit[::-1], return_index=True)
        in_order = backwards[np.argsort(-last, kind="stable")].tolist()  # of their last images, as one process closes
        whole.close(*(visit for visit in in_order if visit in finished))
        return whole

    def _add(self, part: Mapping[str, Any]) -> None:
        self.metrics.add(part["metrics"])
        for steps, metrics in part["readings"].items():
            self.readings.setdefault(steps, VisitMetrics(self.ignore_index)).add(metrics)
        counts = part["counts"]
        self.classes = max(self.classes, counts["classes"])
        self.largest_batch = max(self.largest_batch, counts["largest_batch"])
        self.batches += counts["batches"]
        self._images += counts["_images"]
        self.missed = sorted([*self.missed, *part["missed"]])
        for name in ("_seconds", "_seen", "_hits", "_compared", "_agreed"):
            own = getattr(self, name)
            for visit, value in part["visits"][name].items():
                own[visit] = own.get(visit, 0) + value

    # -- places

    def scored(self, index: int) -> slice:
        """Return which images of a batch count."""
        return slice(None) if self.stream is None else self.stream.scored(index)

    def domain_names(self) -> list[str]:
        """Return the names of the domains, or of the data loaders."""
        if self.stream is None:
            return [self.place(visit)[0].name for visit in range(self._loader + 1)]
        return [domain.name for domain in self.stream.domains]

    def domains(self, visits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the index of the domain for each of the given visits."""
        return visits if self._domain is None else self._domain[visits]

    def place(self, visit: int) -> tuple[Domain, Visit]:
        """Return the domain of a visit and the visit."""
        if self.stream is None:
            several = visit > 0 or self._loader > 0
            return Domain(f"loader_{visit}" if several else "all"), Visit(visit)
        where = self.stream.visits[visit]
        return self.stream.domains[where.domain], where

    def close(self, *visits: int) -> None:
        """Compute the metrics of visits that are over; waits for the device."""
        for visit in visits:
            counts = not self.place(visit)[1].probe
            for metrics in (self.metrics, *self.readings.values()):
                metrics.close(visit, counts)
        self.unwritten += len(visits)

    def close_all(self) -> None:
        """Compute the metrics of all visits that have begun."""
        self.close(*self.metrics.opened)

    @property
    def complete(self) -> bool:
        """Whether the whole stream has been seen."""
        return self.stream is None or self.batches == self.stream.batches

    @property
    def begun(self) -> int:
        """Number of visits that have begun."""
        return len(self._seen)

    @property
    def seconds(self) -> float:
        """Time that all batches took."""
        return sum(self._seconds.values())

    def status(self, visit: int, labelled: bool) -> dict[str, str]:
        """Return the domain of a visit and, where there are labels, the accuracy in it so far."""
        accuracy = {"accuracy": f"{self._hits[visit] / self._seen[visit]:.3f}"} if labelled else {}
        return {"domain": self.place(visit)[0].name, **accuracy}

    # -- numbers

    @property
    def images(self) -> int:
        """Number of images that were measured, probes included."""
        return self._images

    def overall(self) -> Overall | None:
        """Return the measures of all images together, None before a visit is over."""
        total = self.metrics.total()
        if total is None:
            return None
        visits = [visit for visit in self.metrics.closed if not self.place(visit)[1].probe]
        images = sum(self._seen[visit] for visit in visits)
        overall: Overall = {**total, "samples": images, "agreement": self._agreement(visits)}
        return _without_absent(overall)

    def rows(self) -> list[DomainResult]:
        """Return the rows of the visits that are closed, in the order of the stream."""
        return [self._row(visit, self.metrics.closed[visit], self._seconds[visit]) for visit in self._order()]

    def reading(self, steps: int) -> list[DomainResult]:
        """Return the rows after fewer steps."""
        closed = self.readings[steps].closed
        return [self._row(visit, closed[visit], None) for visit in self._order()]

    def _agreement(self, visits: Sequence[int]) -> float | None:
        """Return the share of predictions that are the source's, None where these were not computed."""
        compared = sum(self._compared.get(visit, 0) for visit in visits)
        return sum(self._agreed.get(visit, 0.0) for visit in visits) / compared if compared else None

    def _order(self) -> list[int]:
        return sorted(self.metrics.closed)

    def _row(self, visit: int, measured: ClassificationValues, seconds: float | None) -> DomainResult:
        domain, where = self.place(visit)
        images = self._seen[visit]
        row: DomainResult = {
            "name": domain.name,
            "severity": domain.severity,
            "visit": where.number,
            **measured,
            "samples": images,  # where a prediction is dense, the measured ones are pixels
            "seconds": seconds,
            "images_per_second": images / seconds if seconds else None,
            "start": self._starts[visit],
            "probe": where.probe,
            "agreement": self._agreement([visit]),
        }
        if not where.probe:
            del row["probe"]
        return _without_absent(row)


def visit_starts(stream: Stream) -> dict[int, int]:
    """Return how many images that count come in the batches before each visit's first."""
    visits, first = np.unique(stream.visit, return_index=True)
    batch = np.searchsorted(stream.offsets, first, side="right") - 1
    probe = np.array([visit.probe for visit in stream.visits])[stream.visit]
    counted = np.concatenate([[0], np.cumsum(~probe)])
    return dict(zip(visits.tolist(), counted[stream.offsets[batch]].tolist(), strict=True))


def _without_absent(measures: _Measures) -> _Measures:
    """Return measures without intersections over union, and without an agreement with the source, if there are none."""
    if measures["miou"] is None:
        del measures["miou"]
    if not measures["iou"]:
        del measures["iou"]
    if measures["agreement"] is None:
        del measures["agreement"]
    return measures


def _by_image(logits: Tensor, labels: Tensor, ignore_index: int | None) -> npt.NDArray[np.float64]:
    """Return accuracy and mean entropy of every image, and whether it has no label, (3, B)."""
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        flatten_pixels(logits, labels)  # says what is wrong with them
    without = (labels == UNLABELLED).double()
    hits = (logits.argmax(dim=1) == labels).double()
    spread = entropy(logits).double()
    if hits.ndim > 1:
        counts = torch.ones_like(hits) if ignore_index is None else (labels != ignore_index).double()
        size = counts.flatten(1).sum(1).clamp(min=1)
        hits, spread = ((value * counts).flatten(1).sum(1) / size for value in (hits, spread))
        without = without.flatten(1).amin(1)
    seen: npt.NDArray[np.float64] = torch.stack([hits, spread, without]).cpu().numpy()
    return seen
