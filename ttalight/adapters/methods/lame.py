"""LAME: labels that agree among neighbours, the network frozen."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import is_masked

__all__ = ["LAME", "affinity", "laplacian_adjusted"]

#: What the authors add to probabilities before the logarithm.
_FLOOR = 1e-10


class LAME(FeatureAdapter):
    """Adjusts the predictions of a batch so that images with similar features agree; nothing is learned.

    Returns log-probabilities. Strong where neighbours in a batch share their class (correlated streams), harmful where
    they do not. One forward a batch.

    Source: M. Boudiaf, R. Mueller, I. Ben Ayed, L. Bertinetto, *Parameter-Free Online Test-Time Adaptation*, CVPR
    2022, arXiv 2201.05718. As in the authors' code probabilities are raised by 1e-10 before the logarithm, so that no
    log-probability is below -23: under severe corruptions this floor decides labels. The authors stop once their
    objective changes by less than 1e-8 of itself. Here all ``iterations`` run, which changes no label and does not wait
    for the device.

    Args:
        kernel: ``rbf``, whose width is the mean distance to the k-th nearest (the image itself counted), ``knn``,
            which links each image with its k nearest others, or ``linear``.
        neighbors: Number k.
        symmetric: Whether the ``knn`` kernel is averaged with its transpose.
        iterations: Updates of the labels.
        norm: Statistics of BatchNorm layers, ``source`` as the authors' or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("compares features of images", "neighbours")

    def __init__(
        self,
        kernel: Literal["rbf", "knn", "linear"] = "rbf",
        neighbors: int = 5,
        symmetric: bool = False,
        iterations: int = 100,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        if kernel not in ("rbf", "knn", "linear"):
            raise InputError(f"kernel must be 'rbf', 'knn' or 'linear', got {kernel!r}")
        if neighbors < 1 or iterations < 1:
            raise InputError(f"neighbors and iterations must be at least 1, got {neighbors} and {iterations}")
        self.kernel, self.neighbors, self.symmetric = kernel, neighbors, symmetric
        self.iterations = iterations

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict, then let neighbours agree."""
        with torch.no_grad():
            logits, features = self.read(net, images)
            weights = affinity(F.normalize(features, dim=1), self.kernel, self.neighbors)
            if self.symmetric:
                weights = (weights + weights.T) / 2
            raised = (logits.softmax(1) + _FLOOR).log()
            return laplacian_adjusted(raised.masked_fill(is_masked(logits), -torch.inf), weights, self.iterations)

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return what ``adapt`` returns: there is no state, and the correction is of the batch alone."""
        return self.adapt(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("LAME corrects a batch's predictions behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {"kernel": self.kernel, "neighbors": self.neighbors}


def affinity(features: Tensor, kernel: str, neighbors: int) -> Tensor:
    """Return how much each image of a batch listens to each other one, (B, B).

    Args:
        features: Unit vectors, (B, D).
        kernel: See ``LAME``.
        neighbors: See ``LAME``; a smaller batch has fewer.
    """
    if kernel == "linear":
        return features @ features.T
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    if kernel == "knn":
        nearest = distances.fill_diagonal_(torch.inf).topk(min(neighbors, len(features) - 1), largest=False).indices
        return torch.zeros_like(distances).scatter_(1, nearest, 1.0)
    width = distances.topk(min(neighbors, len(features)), largest=False).values[:, -1].mean()
    # Images that all coincide have width 0: they listen to each other fully.
    return (-distances.square() / (2 * width.square()).clamp_min(torch.finfo(width.dtype).tiny)).exp()


def laplacian_adjusted(log_probabilities: Tensor, weights: Tensor, iterations: int) -> Tensor:
    """Iterate Y = softmax(log p + W Y) from Y = softmax(log p) and return log Y, (B, C).

    Args:
        log_probabilities: (B, C), up to a constant for each row.
        weights: (B, B).
        iterations: Number of updates.
    """
    adjusted = log_probabilities.log_softmax(1)
    for _ in range(iterations):
        adjusted = (log_probabilities + weights @ adjusted.exp()).log_softmax(1)
    return adjusted
