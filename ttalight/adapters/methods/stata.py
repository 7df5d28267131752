"""StatA: Gaussians of a batch that stay near the texts where there are few images, the network frozen."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import is_masked

__all__ = ["StatA", "anchored_gaussians", "cosine_links", "diagonal_scores"]

#: Temperature of the Gaussians and of the links, as in the authors' code.
_TEMPERATURE = 50.0
#: Updates of the labels for each update of the Gaussians.
_LABEL_UPDATES = 5
#: Least variance at the beginning, far below that of any dimension of unit vectors that tells classes apart.
_LEAST = 1e-10


class StatA(FeatureAdapter):
    """Predicts a batch by clusters of its features, each of which is anchored to the text of its class.

    Each class has a Gaussian with a variance for each dimension. Labels, means and variances are updated in turn:
    labels follow the network, the Gaussians and the labels of the nearest images; mean and variance follow the labels,
    and stay the nearer to those of the text the fewer images have the class. So a batch need not have all classes.
    Nothing is kept from batch to batch, as in the authors' code for streams. Returns log-probabilities. One forward a
    batch, and ``iterations`` times five products of (B, B) with (B, C) and five of (B, D) with (D, C).

    Source: M. Zanella, C. Fuchs, C. De Vleeschouwer, I. Ben Ayed, *Realistic Test-Time Adaptation of Vision-Language
    Models*, CVPR 2025, arXiv 2501.03729, after the authors' code. Different from it: in a batch of N images each is
    linked with at most N - 1 others. The variance at the beginning is the mean over all images at any size of the
    batch, where the code divides once for each 2,500 images. Any network with a linear classifier can be adapted; the
    weights are made for logits that are cosines times 100.

    Args:
        anchor: Number of images that the text of a class stands for.
        neighbors: Nearest images that an image is linked with.
        link_weight: Weight of the labels of linked images.
        iterations: Updates of the Gaussians.
        soft: Whether images count for a class with their probabilities, instead of for the predicted class alone.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("clusters features of images", "clusters")

    def __init__(
        self,
        anchor: float = 1.0,
        neighbors: int = 3,
        link_weight: float = 1.0,
        iterations: int = 10,
        soft: bool = False,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        if not 0 < anchor < math.inf:
            raise InputError(f"anchor must be positive and finite, got {anchor}")
        if not 0 <= link_weight < math.inf:
            raise InputError(f"link_weight must be at least 0 and finite, got {link_weight}")
        if neighbors < 1 or iterations < 1:
            raise InputError(f"neighbors and iterations must be at least 1, got {neighbors} and {iterations}")
        self.anchor, self.neighbors, self.link_weight = anchor, neighbors, link_weight
        self.iterations, self.soft = iterations, soft

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the labels that network, Gaussians and links agree on."""
        logits, features = self.read_units(net, images)
        texts = F.normalize(net.head.weight, dim=1)
        by_network = logits.to(features.dtype).masked_fill(is_masked(logits), -torch.inf).log_softmax(1)
        links = self.link_weight / (2 * self.neighbors) * cosine_links(features, self.neighbors)
        labels = by_network.exp()
        first = shared_variance(features, texts, labels)
        means, variances, classes = texts, first.expand_as(texts), torch.arange(len(texts), device=texts.device)
        for update in range(self.iterations + 1):
            if update:
                counts = (labels if self.soft else labels.argmax(1)[:, None] == classes).sum(0)
                share = (counts / (self.anchor + counts)).to(features.dtype)
                means, variances = anchored_gaussians(features, labels, texts, first, share)
            fixed = by_network + diagonal_scores(features, means, variances) / _TEMPERATURE
            for _ in range(_LABEL_UPDATES):
                adjusted = (fixed + links @ labels).log_softmax(1)
                labels = adjusted.exp()
        return adjusted.to(logits.dtype)

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return what ``adapt`` returns: there is no state, and the clusters are of the batch alone."""
        return self.adapt(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("StatA predicts a batch by clusters behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("anchor", "neighbors", "link_weight", "iterations", "soft")
        return super().protocol() | {name: getattr(self, name) for name in names}


def cosine_links(features: Tensor, neighbors: int) -> Tensor:
    """Return the cosines of images with their nearest others, plus the transpose, (B, B).

    Args:
        features: Unit vectors, (B, D).
        neighbors: Number of the nearest; a smaller batch has fewer.
    """
    cosines = (features @ features.T).fill_diagonal_(-torch.inf)
    nearest = cosines.topk(min(neighbors, len(features) - 1), dim=1)
    links = torch.zeros_like(cosines).scatter_(1, nearest.indices, nearest.values)
    return links + links.T


def shared_variance(features: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    """Return the mean square of the deviations from the means of the classes, for each dimension, (D,).

    Args:
        features: (B, D).
        means: (C, D).
        labels: Probabilities of the classes, (B, C).
    """
    squares = features.square() - 2 * features * (labels @ means) + labels @ means.square()
    return squares.mean(0).clamp_min(_LEAST)


def anchored_gaussians(
    features: Tensor, labels: Tensor, texts: Tensor, variance: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Return means, of length one, and variances of the classes, (C, D) each, between those of images and of texts.

    Args:
        features: Unit vectors, (B, D).
        labels: Probabilities of the classes, (B, C).
        texts: Unit vectors, (C, D).
        variance: Of a text, (D,).
        share: Share of the images, in [0, 1), (C,).
    """
    weights = labels / labels.sum(0).clamp_min(torch.finfo(labels.dtype).tiny)
    centres = weights.T @ features
    share = share[:, None]
    means = F.normalize(share * F.normalize(centres, dim=1) + (1 - share) * texts, dim=1)
    spread = weights.T @ features.square() - 2 * means * centres + weights.sum(0)[:, None] * means.square()
    anchored = variance + (texts - means).square()
    return means, share * spread.clamp_min(0) + (1 - share) * anchored


def diagonal_scores(features: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return minus half the squared distances, each dimension divided by its variance, (B, C).

    Args:
        features: (B, D).
        means: (C, D).
        variances: Positive, (C, D).
    """
    inverse = 1 / variances
    linear, constant = features @ (means * inverse).T, (means.square() * inverse).sum(1)
    return linear - (features.square() @ inverse.T + constant) / 2
