"""DoTA: logits corrected by Gaussians of the classes that follow the stream, the network frozen."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.gaussians import gaussian_scores
from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError

__all__ = ["DoTA", "follow_gaussians"]


class DoTA(FeatureAdapter):
    """Adds to the logits the scores of Gaussians of the classes, which are estimated from the stream.

    Each class has a mean, which begins as its row of the classifier, and all share a covariance. The scores are those
    of linear discriminant analysis. Their weight grows with the number of images. Each batch is predicted, and then
    counts for each class with the probability that the network gives to it. One forward and the solution of one (D, D)
    system with C right-hand sides a batch. Memory for C + D features.

    Source: Z. Han, J. Yang, G. Wang, J. Li, Q. Xu, M. Z. Shou, C. Zhang, *DOTA: DistributiOnal Test-time Adaptation of
    Vision-Language Models*, NeurIPS 2025, arXiv 2409.19375, after the authors' code. Different from it: the covariance
    is the mean of those of the classes weighed by their counts, where the code keeps one for each class, 1 GB for 1,000
    classes of 512 dimensions, and weighs them equally. A batch is predicted by what was seen before it, where there
    one image comes after another; with batches of one there is no difference in this. An image is one view, and not
    the mean of the surest of 64. Numbers are float32 or float64, not float16. Labels of unsure images, which the code
    can ask for, are left out. Any network with a linear classifier can be adapted; the weights are made for logits
    that are cosines times 100.

    Args:
        variance: Variance of each dimension at the beginning, with the weight of one image a class.
        ridge: Share of the identity in the covariance that is inverted, in (0, 1).
        growth: Weight of the scores for each image that a class has on average.
        largest_weight: Largest weight of the scores.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("estimates Gaussians of the features of images", "a state")

    def __init__(
        self,
        variance: float = 2e-3,
        ridge: float = 1e-4,
        growth: float = 0.02,
        largest_weight: float = 0.3,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        if not 0 < variance < math.inf:
            raise InputError(f"variance must be positive and finite, got {variance}")
        if not 0 < ridge < 1:
            raise InputError(f"ridge must lie in (0, 1), got {ridge}")
        for name, value in (("growth", growth), ("largest_weight", largest_weight)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        self.variance, self.ridge, self.growth, self.largest_weight = variance, ridge, growth, largest_weight

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with the rows of the classifier as means, those of masked classes left out."""
        super().configure(net)
        weight = net.head.weight
        self._possible = net.possible_classes
        self._means = F.normalize(weight, dim=1) * self._possible[:, None]
        self._counts = self._possible.to(weight.dtype)
        self._identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        self._covariance = self.variance * self._identity

    def method_state(self) -> dict[str, Tensor]:
        """Return means, counts and covariance."""
        return {"means": self._means, "counts": self._counts, "covariance": self._covariance}

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch, then let the Gaussians follow it."""
        logits, features = self.read_units(net, images)
        fused = self._fuse(logits, features)
        probabilities = logits.softmax(1).to(features.dtype)
        follow_gaussians(self._means, self._counts, self._covariance, features, probabilities)
        return fused

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the network and the present Gaussians."""
        return self._fuse(*self.read_units(net, images))

    def _fuse(self, logits: Tensor, features: Tensor) -> Tensor:
        scores = gaussian_scores(features, self._means, self._covariance.lerp(self._identity, self.ridge))
        images_a_class = self._counts.sum() / self._possible.sum()
        return logits + (self.growth * images_a_class).clamp(max=self.largest_weight) * scores

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("DoTA corrects logits by Gaussians behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("variance", "ridge", "growth", "largest_weight")
        return super().protocol() | {name: getattr(self, name) for name in names}


@torch.no_grad()
def follow_gaussians(
    means: Tensor, counts: Tensor, covariance: Tensor, features: Tensor, probabilities: Tensor
) -> None:
    """Let Gaussians follow a batch, in place.

    Means become means over all images so far, weighed by probabilities; deviations are those from the means before.

    Args:
        means: (C, D).
        counts: Sums of probabilities so far, (C,).
        covariance: Of all classes, (D, D).
        features: (B, D).
        probabilities: Class probabilities, (B, C).
    """
    new, seen = probabilities.sum(0), counts.sum()
    cross = features.T @ (probabilities @ means)
    squares = features.T @ (probabilities.sum(1)[:, None] * features) + means.T @ (new[:, None] * means)
    covariance.copy_((seen * covariance + squares - cross - cross.T) / (seen + new.sum()))
    total = (counts + new).clamp_min(torch.finfo(counts.dtype).tiny)  # of masked classes it is 0
    means.copy_((counts[:, None] * means + probabilities.T @ features) / total[:, None])
    counts.add_(new)
