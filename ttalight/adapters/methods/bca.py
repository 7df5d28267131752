"""BCA: means of classes and a table from means to classes, both followed along the stream, the network frozen."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.feature import FeatureAdapter, cosine_scale
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import is_masked

__all__ = ["BCA", "replace_row"]


class BCA(FeatureAdapter):
    """Updates a mean for each class, and the probabilities of the classes given the nearest mean.

    The means begin as the rows of the classifier, and the table of probabilities as the identity. An image is predicted
    by the softmax of its similarities with the means, times the table. If the prediction is sure enough, the mean of
    the predicted class moves towards the image; if it is surer, the row of that class in the table moves towards the
    prediction. Images are predicted and learned from one after another, so how a stream is cut into batches changes
    nothing. Returns log-probabilities. One forward a batch, and a product of C numbers with (C, C) an image. Memory for
    C features and C x C numbers.

    Source: L. Zhou, M. Ye, S. Li, N. Li, X. Zhu, L. Deng, H. Liu, Z. Lei, *Bayesian Test-Time Adaptation for
    Vision-Language Models*, CVPR 2025, arXiv 2503.09248, after the implementation in the benchmark TTABC, which the
    default thresholds and counts are from. Different from it: an image is one view, and not the mean of the surest of
    64. The similarities are the network's logits plus ``scale`` times the change of the cosines, which is the same for
    logits that are cosines times ``scale``, and makes any network with a linear classifier one that can be adapted.

    Args:
        mean_threshold: Probability above which the mean of the predicted class moves.
        mean_count: Number of images that a mean stands for at the beginning.
        prior_threshold: Probability above which the row of the predicted class moves.
        prior_count: Number of images that a row stands for at the beginning.
        scale: Factor on the cosines in the network's logits; by default its classifier's, 100 for one without.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("follows the features of images by means of classes", "a state")

    def __init__(
        self,
        mean_threshold: float = 0.05,
        mean_count: float = 20_000.0,
        prior_threshold: float = 0.65,
        prior_count: float = 1.0,
        scale: float | None = None,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        for name, value in (("mean_threshold", mean_threshold), ("prior_threshold", prior_threshold)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {value}")
        for name, given in (("mean_count", mean_count), ("prior_count", prior_count), ("scale", scale)):
            if given is not None and not 0 < given < math.inf:
                raise InputError(f"{name} must be positive and finite, got {given}")
        self.mean_threshold, self.mean_count = mean_threshold, mean_count
        self.prior_threshold, self.prior_count = prior_threshold, prior_count
        self.scale = scale

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with the rows of the classifier as means, each of which stands for its class."""
        super().configure(net)
        weight = net.head.weight
        self._scale = cosine_scale(net, self.scale)
        self._texts = F.normalize(weight, dim=1)
        self._means = self._texts.clone()
        self._prior = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        self._mean_counts = weight.new_full((len(weight),), self.mean_count)
        self._prior_counts = weight.new_full((len(weight),), self.prior_count)

    def method_state(self) -> dict[str, Tensor]:
        """Return means, the table from means to classes, and how many images each of their rows stands for."""
        return {
            "means": self._means, "mean_counts": self._mean_counts,
            "prior": self._prior, "prior_counts": self._prior_counts,
        }  # fmt: skip

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict each image, then learn from it."""
        logits, features = self.read_units(net, images)
        predicted = []
        for number in range(len(logits)):
            image = slice(number, number + 1)
            predicted.append(self._probabilities(logits[image], features[image]))
            self._follow(features[image], predicted[-1])
        return self._logits(torch.cat(predicted), logits)

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict each image of the batch as if it were the next one."""
        logits, features = self.read_units(net, images)
        return self._logits(self._probabilities(logits, features), logits)

    def _probabilities(self, logits: Tensor, features: Tensor) -> Tensor:
        moved = logits.to(features.dtype) + self._scale * (features @ (self._means - self._texts).T)
        return moved.masked_fill(is_masked(logits), -torch.inf).softmax(1) @ self._prior

    def _logits(self, probabilities: Tensor, logits: Tensor) -> Tensor:
        smallest = torch.finfo(probabilities.dtype).tiny  # a logarithm of 0 would be that of a masked class
        log_probabilities = probabilities.clamp_min(smallest).log().to(logits.dtype)
        return log_probabilities.masked_fill(is_masked(logits), -torch.inf)

    def _follow(self, feature: Tensor, probabilities: Tensor) -> None:
        confidence, predicted = probabilities.max(1)
        mean, prior = self._means.index_select(0, predicted), self._prior.index_select(0, predicted)
        mean = F.normalize(self._mean_counts.index_select(0, predicted)[:, None] * mean + feature, dim=1)
        replace_row(self._means, self._mean_counts, predicted, mean, confidence > self.mean_threshold)
        count = self._prior_counts.index_select(0, predicted)[:, None]
        prior = (count * prior + probabilities) / (count + 1)
        replace_row(self._prior, self._prior_counts, predicted, prior, confidence > self.prior_threshold)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("BCA predicts by means behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("mean_threshold", "mean_count", "prior_threshold", "prior_count", "scale")
        return super().protocol() | {name: getattr(self, name) for name in names}


def replace_row(rows: Tensor, counts: Tensor, number: Tensor, value: Tensor, moves: Tensor) -> None:
    """Replace one row, and count one more value for it, in place, if it moves.

    Args:
        rows: (C, D).
        counts: (C,).
        number: Of the row, (1,).
        value: The new row, (1, D).
        moves: Boolean, (1,).
    """
    rows.index_copy_(0, number, torch.where(moves[:, None], value, rows.index_select(0, number)))
    counts.index_add_(0, number, moves.to(counts.dtype))
