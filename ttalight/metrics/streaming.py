"""Classification metrics of a stream in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from ttalight.errors import InputError
from ttalight.labels import UNLABELLED
from ttalight.metrics.functional import (
    TOP_K,
    add_sums,
    batch_sums,
    class_iou,
    classification_sums,
    diversity,
    expected_calibration_error,
)


class ClassificationValues(TypedDict):
    """Values that :meth:`StreamingClassification.compute` returns.

    ``accuracy``, ``error``, ``top5``, ``ece``, ``diversity`` and ``miou`` are in [0, 1], ``brier`` in [0, 2], ``nll``
    and ``entropy`` in nats. ``top5`` is None for five classes and fewer, ``miou`` for anything but dense predictions.
    ``iou`` has the intersection over union of every class of dense predictions, None for a class that does not occur;
    otherwise it is empty. Without labels only ``samples``, ``entropy`` and ``diversity`` are numbers.
    """

    samples: int
    accuracy: float | None
    error: float | None
    top5: float | None
    nll: float | None
    ece: float | None
    brier: float | None
    entropy: float
    diversity: float
    miou: float | None
    iou: list[float | None]


class StreamingClassification(Metric):
    """Accuracy, top-5, NLL, calibration error, Brier score, entropy and prediction diversity of a stretch of a stream.

    Only sums are kept, on the device: memory does not grow with the stream, any cut into batches gives the same
    numbers, and an update never waits for the device. Dense predictions count every pixel as a sample, and have an
    intersection over union of every class and their mean. They are summed up in blocks of pixels, so that memory beside
    the logits does not grow with the size of the images.

    The Brier score is the original one of all classes, the squared distance of the probabilities from the one-hot
    label (G. W. Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 1950).
    The diversity is the entropy of the predicted classes over log C: 1 for equal shares, 0 for a collapse to one.

    Values are those of this process; ``sync()`` adds up the processes on request.

    Args:
        num_classes: Number of classes C, at least 2.
        bins: Number of equal-width confidence bins of the calibration error.
        ignore_index: Label of samples that do not count, such as 255 in many segmentation sets; picking them out
            waits for the device. If the network has an output of this index, predicting it is an error, and it does not
            count in the mean intersection over union.

    Raises:
        ValueError: If ``num_classes`` < 2 or ``bins`` < 1.

    Example:
        >>> metric = StreamingClassification(num_classes=3)
        >>> metric.update(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]), torch.tensor([0, 1]))
        >>> metric.compute()["accuracy"]
        0.5
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    samples: Tensor
    unlabelled: Tensor
    correct: Tensor
    top5_correct: Tensor
    nll: Tensor
    brier: Tensor
    entropy: Tensor
    bin_count: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor
    predicted: Tensor
    labelled: Tensor
    hits: Tensor
    lowest_label: Tensor
    highest_label: Tensor

    def __init__(self, num_classes: int, bins: int = 15, ignore_index: int | None = None) -> None:
        if num_classes < 2:
            raise InputError(f"num_classes must be >= 2, got {num_classes}")
        if bins < 1:
            raise InputError(f"bins must be >= 1, got {bins}")
        # Processes may hold different domains: to gather at every compute would mix them or wait forever.
        super().__init__(sync_on_compute=False)
        self.num_classes = num_classes
        self.bins = bins
        self.ignore_index = ignore_index
        #: Whether predictions were one class a pixel.
        self.dense = False
        nothing = classification_sums(torch.zeros(0, num_classes), torch.zeros(0, dtype=torch.int64), bins)
        for name, zero in nothing.items():
            self.add_state(name, zero, dist_reduce_fx={"lowest_label": "min", "highest_label": "max"}.get(name, "sum"))

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, C) or (B, C, *), logits or log-probabilities.
            labels: (B,) or (B, *), class indices.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape is wrong. Labels outside [0, C) are reported by :meth:`compute`.
        """
        self.dense = self.dense or logits.ndim > 2
        if logits.ndim > 1 and logits.shape[1] != self.num_classes:
            raise InputError(
                f"got logits of {logits.shape[1]} classes, expected {self.num_classes}: "
                "classes are dimension 1, and num_classes must be the size of the network's output"
            )
        sums = batch_sums(logits, labels, self.bins, self.ignore_index)
        # Not in place: a state made in inference mode may be updated outside of it.
        for name, value in add_sums(self._sums(), sums).items():
            setattr(self, name, value)

    def compute(self) -> ClassificationValues:
        """Metrics of all samples so far; the one place that waits for the device.

        Returns:
            Python numbers; NaN where there was no sample or a logit was not finite.

        Raises:
            ValueError: If a label was outside [0, C).
        """
        return classification_values(self._sums(), self.dense, ignore_index=self.ignore_index)

    def _sums(self) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", self.metric_state)


def classification_values(
    sums: Mapping[str, Tensor], dense: bool = False, partial: bool = False, ignore_index: int | None = None
) -> ClassificationValues:
    """Make metrics from the sums of :func:`classification_sums`; waits for the device.

    Args:
        sums: The sums.
        dense: Whether the samples were pixels.
        partial: Whether some samples may lack the label that others have.
        ignore_index: Label of the samples that were left out.

    Returns:
        See :meth:`StreamingClassification.compute`.

    Raises:
        ValueError: If a label was outside [0, C), or only some samples had one.
    """
    classes = len(sums["predicted"])
    derived = (
        expected_calibration_error(sums["bin_count"], sums["bin_confidence"], sums["bin_correct"]),
        diversity(sums["predicted"]),
        *class_iou(sums["predicted"], sums["labelled"], sums["hits"], ignore_index).unbind(),
    )
    names = (
        "samples", "unlabelled", "correct", "top5_correct", "lowest_label", "highest_label", "nll", "brier", "entropy",
    )  # fmt: skip
    seen = torch.stack([value.double() for value in (*(sums[name] for name in names), *derived)]).tolist()
    samples, unlabelled, correct, top5, lowest, highest, nll, brier, entropy, ece, spread, *iou = seen
    _check_labels(int(lowest), int(highest), classes)
    if 0 < unlabelled < samples and not partial:
        raise InputError(
            f"{int(unlabelled)} of {int(samples)} samples have the label {UNLABELLED}, which means none: "
            "give all samples of a domain a label, or none of them, or name a label that does not count by ignore_index"
        )
    total = samples or math.nan
    known = [value for value in iou if not math.isnan(value)]
    values: ClassificationValues = {
        "samples": int(samples),
        "accuracy": correct / total,
        "error": (samples - correct) / total,
        "top5": top5 / total if classes > TOP_K else None,
        "nll": nll / total,
        "ece": ece,
        "brier": brier / total,
        "entropy": entropy / total,
        "diversity": spread,
        "miou": (sum(known) / len(known) if known else math.nan) if dense else None,
        "iou": [None if math.isnan(value) else value for value in iou] if dense else [],
    }
    return _without_labels(values) if unlabelled else values


def _without_labels(values: ClassificationValues) -> ClassificationValues:
    """Return the measures that need no labels; the others are None."""
    values |= {"accuracy": None, "error": None, "top5": None, "nll": None, "ece": None, "brier": None, "miou": None}
    values["iou"] = []
    return values


def _check_labels(lowest: int, highest: int, classes: int) -> None:
    if lowest < 0 or highest >= classes:
        raise InputError(
            f"saw label {lowest if lowest < 0 else highest} with {classes} classes: labels must be in "
            f"[0, {classes - 1}]; check that the network's classes are those of the data, and name a label that does "
            "not count by ignore_index"
        )
