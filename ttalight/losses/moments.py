"""Alignment of the mean and the covariance of features with those of the source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = ["MomentAlignment", "MomentSummary", "covariance_distance", "feature_moments", "mean_distance"]


def feature_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of features, in float32 (float64 stays float64) even under autocast.

    The covariance is the unbiased one, with B - 1 in the denominator. That of a single vector is zero.

    Args:
        features: (B, D) of any floating type.

    Returns:
        (D,) and (D, D).

    Raises:
        ValueError: If the shape is another, or B is 0.
    """
    if features.ndim != 2 or len(features) == 0:
        raise InputError(
            f"expected features (batch, dimension) of at least one image, got {tuple(features.shape)}: pool or flatten "
            "maps first"
        )
    with torch.autocast(features.device.type, enabled=False):
        features = features if features.dtype == torch.float64 else features.float()
        mean = features.mean(0)
        deviations = features - mean
        return mean, deviations.T @ deviations / max(1, len(features) - 1)


def covariance_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared Frobenius distance of two covariances over 4 D^2, a scalar.

    B. Sun, K. Saenko, *Deep CORAL: Correlation Alignment for Deep Domain Adaptation*, ECCV 2016 workshops, arXiv
    1607.01719.

    Args:
        first: (D, D).
        second: (D, D).
    """
    return (first - second).square().sum() / (4 * first.shape[0] ** 2)


def mean_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of two means, a scalar: a maximum mean discrepancy with a linear kernel, over D.

    Args:
        first: (D,).
        second: (D,).
    """
    return (first - second).square().mean()


class MomentSummary:
    """Mean and covariance of a whole set, and how far those of single batches lie from the first batch's.

    Batches are merged as they come (T. Chan, G. Golub, R. LeVeque, *Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances*, 1979), so that features need not be kept.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._scatter = torch.empty(0)
        self._reference: tuple[Tensor, Tensor] | None = None
        self._distances: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Take another batch, (B, D)."""
        mean, covariance = feature_moments(features)
        count, scatter = len(features), covariance * (len(features) - 1)
        if self._reference is None:
            self._reference = mean, covariance
            self._count, self._mean, self._scatter = count, mean, scatter
            return
        reference_mean, reference_covariance = self._reference
        apart = covariance_distance(reference_covariance, covariance), mean_distance(reference_mean, mean)
        self._distances.append(torch.stack(apart))
        total, shift = self._count + count, mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self._count * count / total)
        self._mean, self._count = self._mean + shift * (count / total), total

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (D,), unbiased covariance (D, D), and the average distances of covariances and of means, (2,).

        Raises:
            ValueError: If there were fewer than two batches, which leaves nothing to compare.
        """
        if not self._distances:
            raise InputError(
                "the scale of moment alignment is the distance between batches of source features, and there were "
                "fewer than two: use smaller batches or more images"
            )
        return self._mean, self._scatter / (self._count - 1), torch.stack(self._distances).mean(0)


class MomentAlignment(nn.Module):
    """Distance of the moments of target features from those of the source, in units of the source's own spread.

    With S and mu the source's covariance and mean, a and b the average distances of source batches from each other
    (``MomentSummary``), the loss is weight * (covariance_distance / a + mean_distance / (2 b)): a target batch that is
    like any source batch costs about 1.5 times the weight.

    Y. Liu et al., *TTT++: When Does Self-Supervised Test-Time Training Fail or Thrive?*, NeurIPS 2021. Moments of the
    first source batch are part of the summary here; the authors' code only compares with them.

    Args:
        width: Dimension D of the features.
        weight: See above.
        queue: Feature vectors of past batches that join a batch in its moments, without gradients, as soon as there
            are that many; 0 for the batch alone.

    Raises:
        ValueError: If the weight or the length is negative.
    """

    def __init__(self, width: int, weight: float = 1.0, queue: int = 0) -> None:
        super().__init__()
        if weight < 0:
            raise InputError(f"the weight of moment alignment must be at least 0, got {weight}")
        if queue < 0:
            raise InputError(f"queue must be at least 0, got {queue}")
        self.weight = weight
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("covariance", torch.zeros(width, width))
        #: Average distances of covariances and means; zero until there is a summary.
        self.register_buffer("spread", torch.zeros(2))
        self.register_buffer("queue", torch.zeros(queue, width), persistent=False)
        self.register_buffer("queued", torch.zeros((), dtype=torch.long), persistent=False)
        self.mean: Tensor
        self.covariance: Tensor
        self.spread: Tensor
        self.queue: Tensor
        self.queued: Tensor

    def summarize(self, summary: MomentSummary) -> None:
        """Take the source's moments.

        Raises:
            ValueError: If the summary is of fewer than two batches.
        """
        for own, value in zip((self.mean, self.covariance, self.spread), summary.result(), strict=True):
            own.copy_(value)

    @property
    def is_summarized(self) -> bool:
        """Whether the source's moments are there."""
        return bool(self.spread[0] > 0)

    def forward(self, features: Tensor) -> Tensor:
        """The loss of features (B, D), a scalar; where gradients are recorded, the features enter the queue after it.

        Raises:
            ValueError: If the source's moments are not there.
        """
        if not self.is_summarized:
            raise InputError("there are no moments of the source to align with: call summarize first")
        past = self.queue if len(self.queue) and int(self.queued) == len(self.queue) else self.queue[:0]
        mean, covariance = feature_moments(torch.cat((features, past.to(features.dtype))))
        apart = covariance_distance(self.covariance, covariance), mean_distance(self.mean, mean)
        if torch.is_grad_enabled():
            self._enqueue(features.detach())
        return self.weight * (apart[0] / self.spread[0] + apart[1] / (2 * self.spread[1]))

    def _enqueue(self, features: Tensor) -> None:
        length = len(self.queue)
        if length:
            self.queue.copy_(torch.cat((features.to(self.queue.dtype), self.queue))[:length])
            self.queued.add_(len(features)).clamp_(max=length)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"width={len(self.mean)}, weight={self.weight}, queue={len(self.queue)}"
