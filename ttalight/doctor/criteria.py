"""Measures of predictions and statistics that need no labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttalight.metrics.functional import diversity

__all__ = ["agreement", "mean_entropy", "prediction_diversity", "statistics_distance", "stream_correlation"]


def statistics_distance(mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the distance of a batch's statistics from the running ones of a BatchNorm layer.

    The Kullback-Leibler divergence of the Gaussian of the batch from that of the running statistics, averaged over the
    channels. It is 0 for equal statistics and does not depend on the scale of the input.

    Args:
        mean: Running mean, (C,).
        var: Running variance, (C,).
        batch_mean: Mean of the batch, (C,).
        batch_var: Variance of the batch, (C,).
        eps: Added to both variances, as the layer does.

    Returns:
        A scalar, in nats.
    """
    ratio = (batch_var + eps) / (var + eps)
    moved = (batch_mean - mean).square() / (var + eps)
    return 0.5 * (moved + ratio - 1 - ratio.log()).mean()


def mean_entropy(logits: Tensor) -> float:
    """Return the mean entropy of predictions as a share of its maximum ln C, from logits (N, C)."""
    probs = logits.softmax(dim=1)
    return float(torch.special.entr(probs).sum(dim=1).mean()) / math.log(logits.shape[1])


def prediction_diversity(predictions: Tensor, classes: int) -> float:
    """Return the entropy of predicted classes, (N,), as a share of ln C: 1 for equal shares, 0 for one class."""
    return float(diversity(torch.bincount(predictions, minlength=classes)))


def agreement(first: Tensor, second: Tensor) -> float:
    """Return the share of equal predictions, both (N,)."""
    return float((first == second).double().mean())


def stream_correlation(predictions: Tensor, sizes: list[int], classes: int) -> float:
    """Return how much the batch of an image says about its predicted class: 0 for a random order, 1 for sorted classes.

    It is the mutual information of batch and class, divided by the entropy of the classes. With random batches this
    information is about (K - 1) (B - 1) / (2 N) nats by chance, for K classes that occur, B batches and N images
    (G. A. Miller, "Note on the bias of information estimates", 1955), which is subtracted.

    Args:
        predictions: Predicted classes in the order of the stream, (N,).
        sizes: Sizes of its batches, which add up to N.
        classes: Number of classes.

    Returns:
        A share, at least 0. It is 0 with a single batch or a single predicted class.
    """
    counts = torch.stack([torch.bincount(part, minlength=classes) for part in torch.split(predictions, sizes)]).double()
    total = counts.sum(dim=0)
    occurring, images = int((total > 0).sum()), float(total.sum())
    whole = _entropy(total)
    if occurring < 2 or len(sizes) < 2:
        return 0.0
    within = float((counts.sum(dim=1) / images * torch.stack([_entropy(part) for part in counts])).sum())
    chance = (occurring - 1) * (len(sizes) - 1) / (2 * images)
    return max(0.0, (float(whole) - within - chance) / float(whole))


def _entropy(counts: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(counts / counts.sum()).sum()
    return entropy
