"""Estimates of accuracy without labels, batch by batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttalight.engine import Engine
from ttalight.errors import InputError, InputTypeError
from ttalight.monitoring.estimates import (
    agreement,
    confidence_threshold,
    disagreement_accuracy,
    dropout_predictions,
    thresholded_accuracy,
)
from ttalight.monitoring.observer import LateReads, Monitoring
from ttalight.monitoring.passes import adapted_outputs, source_outputs
from ttalight.seeding import derive_seed

__all__ = ["AccuracyEstimator", "DropoutDisagreement", "Estimate", "MemberAgreement", "ThresholdedConfidence"]


class Estimate(NamedTuple):
    """An accuracy that was estimated, not measured.

    Args:
        method: Name of the estimator, such as ``atc``.
        batch: Number of the batch, from 1.
        images: Images of the batch.
        accuracy: The estimate, between 0 and 1.
    """

    method: str
    batch: int
    images: int
    accuracy: float

    def __repr__(self) -> str:
        return f"estimated accuracy {self.accuracy:.3f} ({self.method}, batch {self.batch}, {self.images} images)"


class AccuracyEstimator(Monitoring):
    """Base of the estimators of the accuracy of a model that adapts: one estimate a batch, read with the next batch.

    In a run each estimate is logged as ``estimated_accuracy/<method>``. No estimate is a measurement:
    ``docs/results/monitoring.md`` shows how far they are from the truth.
    """

    #: Name of the method in curves and estimates.
    method = "estimate"

    def begin(self, engine: Engine) -> None:
        """Forget an earlier stream."""
        #: Estimates of the batches so far, except the last, which is read with the next batch.
        self.estimates: list[Estimate] = []
        self._late, self._pending = LateReads(), (0, 0)

    def see(self, engine: Engine, logits: Tensor) -> None:
        """Estimate the accuracy of the batch, and read that of the one before."""
        if logits.ndim > 2:
            raise InputError(f"{type(self).__name__} is for predictions of images, (B, C), got {tuple(logits.shape)}")
        value = self.estimate(engine, logits)
        place, self._pending = self._pending, (engine.batches, len(logits))
        seen = self._late.exchange(value.view(1))
        if seen is not None:
            self.estimates.append(Estimate(self.method, *place, seen[0]))

    @abstractmethod
    def estimate(self, engine: Engine, logits: Tensor) -> Tensor:
        """Return the estimate of a batch, a scalar on the device."""

    @property
    def accuracy(self) -> float | None:
        """The estimate for all images so far; None before the second batch."""
        images = sum(estimate.images for estimate in self.estimates)
        return sum(e.accuracy * e.images for e in self.estimates) / images if images else None

    def curves(self) -> dict[str, float]:
        """Return the last estimate."""
        return {f"estimated_accuracy/{self.method}": self.estimates[-1].accuracy} if self.estimates else {}


class ThresholdedConfidence(AccuracyEstimator):
    """Average thresholded confidence: the share of predictions that are more certain than a threshold.

    As many predictions of labelled source images are below the threshold as are wrong, see ``confidence_threshold``.
    The threshold is chosen with the first batch, from passes of the labelled images through the model as it is then,
    normalised as its method does. Later batches need no further pass. The estimate assumes that a shift changes
    accuracy and confidence together: adaptation that only raises confidence looks like better accuracy.

    Args:
        images: Labelled source images, (N, 3, H, W), as the network expects them; not those it was trained on.
        labels: (N,).
        batch_size: Labelled images a pass.
    """

    method = "atc"

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int = 200) -> None:
        if len(images) != len(labels) or not len(labels):
            raise InputError(f"give a label for each image, got {len(images)} images and {len(labels)} labels")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self._threshold: Tensor | None = None

    def begin(self, engine: Engine) -> None:
        """Forget an earlier stream."""
        super().begin(engine)
        self._threshold = None

    def estimate(self, engine: Engine, logits: Tensor) -> Tensor:
        """Return the share of predictions above the threshold."""
        if self._threshold is None:
            device = engine.net.device
            parts = [adapted_outputs(engine, part.to(device)) for part in torch.split(self.images, self.batch_size)]
            seen = torch.cat([part.logits for part in parts])
            self._threshold = confidence_threshold(seen, self.labels.to(device))
        return thresholded_accuracy(logits, self._threshold)


class DropoutDisagreement(AccuracyEstimator):
    """Disagreement with predictions under drop-out of what the classifier reads, corrected where classes are few.

    After T. Lee, S. Chottananurak, T. Gong, S.-J. Lee, *AETTA: Label-Free Accuracy Estimation for Test-Time
    Adaptation*, CVPR 2024, arXiv 2404.01351, with their number of samples, rate for CIFAR-10, exponent and average.
    Differences: their networks have drop-out between blocks, and pass each batch once for each sample. Here only the
    classifier's input is dropped, so one further pass a batch is enough for any network with a linear classifier, but
    the estimate misses the uncertainty of earlier layers. Labels are not needed.

    Args:
        rate: Share of features that are dropped.
        samples: Masks for each image.
        power: Exponent of the correction, see ``disagreement_accuracy``.
        momentum: Share of the present batch in the moving average of the error.
    """

    method = "dropout"

    def __init__(self, rate: float = 0.4, samples: int = 10, power: float = 3.0, momentum: float = 0.4) -> None:
        if not 0 < rate < 1:
            raise InputError(f"rate must be above 0 and below 1, got {rate}")
        if samples < 1:
            raise InputError(f"samples must be at least 1, got {samples}")
        if power < 0:
            raise InputError(f"power must be at least 0, got {power}")
        if not 0 < momentum <= 1:
            raise InputError(f"momentum must be above 0 and at most 1, got {momentum}")
        self.rate, self.samples, self.power, self.momentum = rate, samples, power, momentum
        self._mean: Tensor | None = None

    def begin(self, engine: Engine) -> None:
        """Forget an earlier stream."""
        super().begin(engine)
        self._mean = None

    def estimate(self, engine: Engine, logits: Tensor) -> Tensor:
        """Return the moving average of the estimate; one further pass."""
        net = engine.net
        assert net.images is not None, "a batch has images until it ends"
        head, outputs = net.head, adapted_outputs(engine, net.images)
        features = outputs.features
        if features is None or features.ndim != 2:
            raise InputError("DropoutDisagreement needs a classifier that reads one vector an image")
        generator = torch.Generator(features.device).manual_seed(derive_seed(net.seed, "dropout", engine.batches))
        dropped = dropout_predictions(features, head, self.rate, self.samples, generator)
        value = disagreement_accuracy(outputs.logits, dropped, self.power)
        self._mean = value if self._mean is None else self._mean.lerp(value, self.momentum)
        return self._mean


class MemberAgreement(AccuracyEstimator):
    """Agreement of the adapting model with a second member; one further pass a batch.

    It is near the accuracy if the two members err independently, see ``agreement``. The source model (the default) has
    nearly the weights of the adapted one, so that both err together, and it is the worse of the two under a shift. A
    second network that was trained from another seed, and adapted like the first, is closer to the assumption.

    Args:
        member: A network that takes the same images, or an adapted one; the source model by default.
    """

    method = "agreement"

    def __init__(self, member: Callable[[Tensor], Any] | None = None) -> None:
        if member is not None and not callable(member):
            raise InputTypeError(f"member must be a network, got a {type(member).__name__}")
        self.member = member

    def estimate(self, engine: Engine, logits: Tensor) -> Tensor:
        """Return the share of images that both predict alike."""
        images = engine.net.images
        assert images is not None, "a batch has images until it ends"
        others = source_outputs(engine, images).logits if self.member is None else self.member(images)
        return agreement(logits, others)
