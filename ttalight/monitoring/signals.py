"""Label-free signals of predictions and of weights, as numbers on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttalight.losses import entropy

__all__ = ["flat_predictions", "prediction_counts", "prediction_sums", "relative_distance", "shannon"]


def flat_predictions(logits: Tensor) -> Tensor:
    """Return logits with one row for each prediction, (N, C).

    Args:
        logits: (B, C), or (B, C, H, W), of which every pixel is a prediction.
    """
    return logits if logits.ndim == 2 else logits.flatten(2).transpose(1, 2).flatten(0, 1)


def prediction_counts(logits: Tensor) -> Tensor:
    """Return how many rows are predicted as each class, (C,), without a wait for the device.

    Args:
        logits: (N, C).
    """
    predicted = logits.argmax(1)
    return logits.new_zeros(logits.shape[1]).scatter_add_(0, predicted, torch.ones_like(predicted, dtype=logits.dtype))


def prediction_sums(logits: Tensor) -> Tensor:
    """Return the sums over rows that signals are made from: entropies, counts and probabilities, (1 + 2 C,).

    Args:
        logits: (N, C).
    """
    return torch.cat([entropy(logits).sum().view(1), prediction_counts(logits), logits.softmax(1).sum(0)])


def shannon(weights: Tensor) -> Tensor:
    """Return the entropy in nats of a distribution that weights are proportional to, a scalar.

    Its exponential is the effective number of classes: C for the uniform one, 1 where one class has all.

    Args:
        weights: (C,), at least 0.
    """
    shares = weights / weights.sum()
    return -torch.xlogy(shares, shares).sum()


def relative_distance(
    values: Sequence[Tensor], others: Sequence[Tensor], unit: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the Euclidean distance of two lists of tensors divided by the norm of a third, a scalar.

    A unit of zeros alone counts as of norm 1.

    Args:
        values: Tensors.
        others: As many, of the same shapes.
        unit: Tensors; those of ``others`` by default.
    """
    difference = torch._foreach_sub(list(values), list(others))
    norms = (torch.stack(torch._foreach_norm(part)).norm() for part in (difference, list(unit or others)))
    apart, size = norms
    distance: Tensor = apart / torch.where(size > 0, size, 1)
    return distance
