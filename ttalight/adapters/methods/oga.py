"""OGA: logits corrected by Gaussians of the surest images of each class, the network frozen."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.class_cache import ClassCache
from ttalight.adapters.components.gaussians import gaussian_scores
from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import entropy

__all__ = ["OGA", "ridge_covariance"]

#: Variance in all directions together that is added to the covariance, so that it can be inverted. Unit vectors have
#: less than 1.
_RIDGE = 1e-4


class OGA(FeatureAdapter):
    """Adds to the logits the scores of Gaussians of the classes, which are estimated from a cache.

    The cache keeps the features of lowest entropy of each predicted class. The mean of a class is that of its features,
    or its row of the classifier while there are fewer than two. All classes share a covariance, whose estimate is
    shrunk as long as there are few features. A batch is inserted into the cache and then predicted, so predictions
    depend on how a stream is cut into batches. One forward, a product of (D, M C) with (M C, D) for M = ``size``, and
    the solution of one (D, D) system with C right-hand sides a batch. Memory for M C features.

    Source: C. Fuchs, M. Zanella, C. De Vleeschouwer, *Online Gaussian Test-Time Adaptation of Vision-Language Models*,
    CVPR Workshops 2025, arXiv 2501.04352, after the authors' code. The shrunk estimate is that of the empirical Bayes
    ridge. Different from the code: a mean is the sum of the features over their number, where the code divides by
    ``size`` while the cache is not full. With more than 4 D features the covariance gets a very small ridge instead of
    a pseudo-inverse, which waits for the device. Numbers are float32 or float64. Any network with a linear classifier
    can be adapted; the weight is made for logits that are cosines times 100.

    Args:
        size: Features of a class in the cache.
        weight: Weight of the scores.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("keeps features of images", "a cache")
    prediction = "after"

    def __init__(
        self,
        size: int = 8,
        weight: float = 0.05,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        if size < 1:
            raise InputError(f"size must be at least 1, got {size}")
        if not 0 <= weight < math.inf:
            raise InputError(f"weight must be at least 0 and finite, got {weight}")
        self.size, self.weight = size, weight

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with an empty cache."""
        super().configure(net)
        rows = net.head.weight
        self._texts = F.normalize(rows, dim=1) * net.possible_classes[:, None]
        self._cache = ClassCache(rows, self.size)

    def method_state(self) -> dict[str, Tensor]:
        """Return the cache."""
        return self._cache.state

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Insert the batch, then predict it."""
        logits, features = self.read_units(net, images)
        classes, entropies = logits.argmax(1), entropy(logits)
        self._cache.insert(self._cache.places(classes, entropies)[-1], classes, features, entropies)
        return self._fuse(logits, features)

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the network and the present cache."""
        return self._fuse(*self.read_units(net, images))

    def _fuse(self, logits: Tensor, features: Tensor) -> Tensor:
        cached, present = self._cache.features, self._cache.entropies < torch.inf
        counts = present.sum(1)[:, None]
        means = torch.where(counts >= 2, cached.sum(1) / counts.clamp_min(1), self._texts)  # empty places are 0
        covariance = ridge_covariance((cached - means[:, None]).flatten(0, 1), present.flatten())
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device) / len(covariance)
        covariance = torch.where((counts > 2).any(), covariance, identity)
        return logits + self.weight * gaussian_scores(features, means, covariance + _RIDGE * identity)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("OGA corrects logits by Gaussians behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"size": self.size, "weight": self.weight}


def ridge_covariance(deviations: Tensor, present: Tensor) -> Tensor:
    """Return the covariance of those that are present, (D, D), which is shrunk where there are not more than 4 D.

    The shrunk estimate of n vectors with the covariance S is ((n - 1) S + tr(S) I) / D.

    Args:
        deviations: Of features from the means of their classes, (N, D).
        present: Boolean, (N,).
    """
    width, count = deviations.shape[1], present.sum()
    mask = present[:, None].to(deviations.dtype)
    centred = (deviations - (deviations * mask).sum(0) / count.clamp_min(1)) * mask
    scatter = centred.T @ centred
    covariance = scatter / (count - 1).clamp_min(1)
    identity = torch.eye(width, dtype=scatter.dtype, device=scatter.device)
    shrunk = (scatter + covariance.trace() * identity) / width
    return torch.where(count <= 4 * width, shrunk, covariance)
