"""MTA: the mode of the features of the views, with a score of quality for each view."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.views import EpisodicViewAdapter, count_of
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses.entropy import is_masked

__all__ = ["MTA", "mode_weights"]

_ITERATIONS = 5


class MTA(EpisodicViewAdapter):
    """Predicts by the mode of the features of the views, found by a MeanShift in which good views weigh more.

    The weight of a view grows with the density at its place and with the weights of views whose predictions are like
    its own. Weights and mode are updated in turn. No threshold leaves views out. There is no state. ``views`` forwards
    a batch.

    Source: M. Zanella, I. Ben Ayed, *On the Test-Time Zero-Shot Generalization of Vision-Language Models: Do We Really
    Need Prompt Learning?*, CVPR 2024, arXiv 2405.02266, after the authors' code. Different from it: each loop makes its
    five iterations, where the code stops once a step is below 1e-6, so a GPU need not wait. Any network with a linear
    classifier can be adapted: the logits of the mode are the weighted mean of those of the views, scaled as the mode
    is.

    Args:
        affinity_weight: Weight of the similarity of predictions.
        temperature: Temperature of the weights of the views.
        neighbors: Share of the other views, the nearest ones, whose distances are the bandwidth at a view, in (0, 1].
        kwargs: See ``ViewAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("finds the mode of the features of random crops", "views")

    def __init__(
        self, affinity_weight: float = 4.0, temperature: float = 0.2, neighbors: float = 0.3, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= affinity_weight < math.inf:
            raise InputError(f"affinity_weight must be at least 0 and finite, got {affinity_weight}")
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be positive and finite, got {temperature}")
        if not 0 < neighbors <= 1:
            raise InputError(f"neighbors must lie in (0, 1], got {neighbors}")
        self.affinity_weight, self.temperature, self.neighbors = affinity_weight, temperature, neighbors

    def merge(self, net: AdaptiveNetwork, logits: Tensor, features: Tensor) -> Tensor:
        """Return the logits of the mode, (B, C)."""
        units = F.normalize(features, dim=2)
        neighbors = count_of(self.neighbors, self.views - 1)
        predictions = logits.softmax(2).to(units.dtype)
        weights = mode_weights(units, predictions, neighbors, self.affinity_weight, self.temperature)
        masked = is_masked(logits[:, 0])
        finite = logits.to(units.dtype).masked_fill(masked[:, None], 0.0)
        length = torch.linalg.vector_norm(torch.einsum("bv,bvd->bd", weights, units), dim=1, keepdim=True)
        merged: Tensor = torch.einsum("bv,bvc->bc", weights, finite) / length.clamp_min(1e-12)
        return merged.to(logits.dtype).masked_fill(masked, -torch.inf)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("affinity_weight", "temperature", "neighbors")
        return super().protocol() | {name: getattr(self, name) for name in names}


def mode_weights(
    units: Tensor, predictions: Tensor, neighbors: int, affinity_weight: float, temperature: float
) -> Tensor:
    """Return the weights of the views of which the mode is the mean, up to its length: (B, V), of sum one.

    Args:
        units: Unit vectors along the features of the views, (B, V, D); the mode begins at the first.
        predictions: Their probabilities, (B, V, C).
        neighbors: Number of other views whose distances are the bandwidth at a view.
        affinity_weight: Weight of the similarity of predictions.
        temperature: Temperature of the scores.
    """
    distances = (2 - 2 * units @ units.transpose(1, 2)).clamp_min(0)
    nearest = distances.sort(dim=2).values[:, :, 1 : neighbors + 1]
    doubled = nearest.mean(2).clamp_min(torch.finfo(units.dtype).eps)  # twice the squared bandwidth
    affinities = affinity_weight * predictions @ predictions.transpose(1, 2)
    scores = units.new_full(units.shape[:2], 1 / units.shape[1])
    mode, weights = units[:, 0], scores
    for _ in range(_ITERATIONS):
        density = _density(mode, units, doubled)
        for _ in range(_ITERATIONS):
            scores = ((density + (affinities @ scores[:, :, None])[:, :, 0]) / temperature).softmax(1)
        for _ in range(_ITERATIONS):
            weights = scores * _density(mode, units, doubled)
            weights = weights / weights.sum(1, keepdim=True)
            mode = F.normalize(torch.einsum("bv,bvd->bd", weights, units), dim=1)
    return weights


def _density(mode: Tensor, units: Tensor, doubled: Tensor) -> Tensor:
    """Return a Gaussian kernel between a mode, (B, D), and the views, with a bandwidth at each: (B, V)."""
    return (-(mode[:, None] - units).square().sum(2) / doubled).exp()
