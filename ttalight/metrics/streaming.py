"""Classification metrics of a stream in bounded memory."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric

from ttalight.metrics.functional import (
    TOP_K,
    classification_sums,
    diversity,
    expected_calibration_error,
    flatten_pixels,
)


class ClassificationValues(TypedDict):
    """What :meth:`StreamingClassification.compute` returns: fractions in [0, 1], ``nll`` and ``entropy`` in nats."""

    samples: int
    accuracy: float
    error: float
    top5: float | None
    nll: float
    ece: float
    entropy: float


class StreamingClassification(Metric):
    """Accuracy, top-5, NLL, calibration error and entropy of one stretch of a stream, such as a visit of a domain.

    Only sums are kept, on the device: memory does not grow with the stream, any cut into batches gives the same
    numbers, and an update never waits for the device. Dense predictions count every pixel as a sample.

    Values are those of this process; ``sync()`` adds up the processes on request.

    Args:
        num_classes: Number of classes C, at least 2.
        bins: Number of equal-width confidence bins of the calibration error.

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
    correct: Tensor
    top5_correct: Tensor
    nll: Tensor
    entropy: Tensor
    bin_count: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor
    predicted: Tensor
    lowest_label: Tensor
    highest_label: Tensor

    def __init__(self, num_classes: int, bins: int = 15) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        if bins < 1:
            raise ValueError(f"bins must be >= 1, got {bins}")
        # Processes may hold different domains: to gather at every compute would mix them or wait forever.
        super().__init__(sync_on_compute=False)
        self.num_classes = num_classes
        self.bins = bins
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
        logits, labels = flatten_pixels(logits, labels)
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"got logits of {logits.shape[1]} classes, expected {self.num_classes}: "
                "classes are dimension 1, and num_classes must be the size of the network's output"
            )
        for name, value in classification_sums(logits, labels, self.bins).items():
            # Not in place: a state made in inference mode may be updated outside of it.
            combine = {"lowest_label": torch.minimum, "highest_label": torch.maximum}.get(name, torch.add)
            setattr(self, name, combine(getattr(self, name), value))

    def compute(self) -> ClassificationValues:
        """Metrics of all samples so far; the one place that waits for the device.

        Returns:
            Python numbers; NaN where there was no sample or a logit was not finite. ``top5`` is None for C <= 5.

        Raises:
            ValueError: If a label was outside [0, C).
        """
        ece = expected_calibration_error(self.bin_count, self.bin_confidence, self.bin_correct)
        counts = (self.samples, self.correct, self.top5_correct, self.lowest_label, self.highest_label)
        samples, correct, top5, lowest, highest, nll, entropy, ece_value = torch.stack(
            [value.double() for value in (*counts, self.nll, self.entropy, ece)]
        ).tolist()
        if lowest < 0 or highest >= self.num_classes:
            seen = int(lowest if lowest < 0 else highest)
            raise ValueError(
                f"saw label {seen} with {self.num_classes} classes: labels must be in [0, {self.num_classes - 1}]; "
                "check that the network's classes are those of the data"
            )
        total = samples or float("nan")
        return {
            "samples": int(samples),
            "accuracy": correct / total,
            "error": (samples - correct) / total,
            "top5": top5 / total if self.num_classes > TOP_K else None,
            "nll": nll / total,
            "ece": ece_value,
            "entropy": entropy / total,
        }

    def diversity(self) -> float:
        """Entropy of the predicted classes over log C: 1 for equal shares, 0 for a collapse; waits for the device."""
        return float(diversity(self.predicted))
