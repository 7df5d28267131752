"""Class separation of features, and their distance to those that a classifier was trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttalight.errors import InputError

__all__ = ["MedianDistance", "class_medians", "davies_bouldin", "median_distance"]


class MedianDistance(NamedTuple):
    """Distance between the class medians of two sets of features.

    Args:
        mean: Mean Euclidean distance over the classes that both sets have.
        total: Sum of these distances.
        relative: The mean divided by the mean norm of the reference's medians: that of features of any scale.
    """

    mean: float
    total: float
    relative: float


def davies_bouldin(features: Tensor, labels: Tensor) -> float:
    """Return the Davies-Bouldin index of features grouped by their true labels; lower is better separated.

    The mean over classes of the largest ratio of s_i + s_j to the distance between c_i and c_j, with c the mean of a
    class and s the mean distance to it. It depends neither on where the features lie nor on their scale. Computed in
    float64 and with exact distances: torchmetrics 1.9 is right only for up to 25 classes, beyond which the distance of
    a class to itself is rounded to something above zero there and decides the maximum.

    Source: D. L. Davies and D. W. Bouldin, *A Cluster Separation Measure*, IEEE Transactions on Pattern Analysis and
    Machine Intelligence, 1979.

    Args:
        features: (N, D).
        labels: Classes, integers (N,).

    Raises:
        ValueError: If shapes do not fit, there are fewer than two classes, or as many as samples.
    """
    _check(features, labels)
    classes = len(torch.unique(labels))
    if not 1 < classes < len(labels):
        raise InputError(
            f"the Davies-Bouldin index needs two classes at least, and one with two samples, got {classes} classes of "
            f"{len(labels)} samples"
        )
    points = features.double()
    groups = [points[labels == label] for label in torch.unique(labels).tolist()]
    centres = torch.stack([group.mean(0) for group in groups])
    widths = torch.stack([(group - centre).norm(dim=1).mean() for group, centre in zip(groups, centres, strict=True)])
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    return float(((widths[:, None] + widths) / apart).amax(dim=1).mean())


def class_medians(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the median of each class in each coordinate, (C, D); NaN for a class without samples.

    Of an even number of values the median is the mean of both in the middle.

    Args:
        features: (N, D).
        labels: Classes, integers (N,) in [0, C).
        num_classes: Number of classes C.

    Raises:
        ValueError: If shapes do not fit, or a label is out of range.
    """
    _check(features, labels)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(
            f"labels must be in 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}: is num_classes "
            "that of the data?"
        )
    medians = torch.full((num_classes, features.shape[1]), torch.nan, dtype=features.dtype, device=features.device)
    for label in torch.unique(labels).tolist():
        own = features[labels == label].sort(dim=0).values
        medians[label] = (own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2
    return medians


def median_distance(features: Tensor, labels: Tensor, reference: Tensor) -> MedianDistance | None:
    """Return how far the class medians of features are from those of a reference; None without a common class.

    The "distance to the source classifier space" of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time
    Training*, arXiv 2507.05221, Table 6, which does not say how classes are put together: mean and sum are both given.

    Args:
        features: (N, D).
        labels: Classes, integers (N,) in [0, C).
        reference: Class medians, (C, D), as of ``class_medians``; NaN for a class that it does not have.

    Raises:
        ValueError: If shapes do not fit, or a label is out of range.
    """
    if reference.ndim != 2 or features.ndim != 2 or reference.shape[1] != features.shape[1]:
        raise InputError(
            f"features and medians must have the same dimension, got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}"
        )
    own = class_medians(features.double(), labels, len(reference))
    medians = reference.to(own)
    distances = (own - medians).norm(dim=1)
    both = distances.isfinite()
    if not both.any():
        return None
    mean = distances[both].mean()
    norm = medians[both].norm(dim=1).mean()
    return MedianDistance(float(mean), float(distances[both].sum()), float(mean / norm))


def _check(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or not features.is_floating_point():
        raise InputError(
            f"expected floating-point features (N, D) and labels (N,), got {tuple(features.shape)} of {features.dtype} "
            f"and {tuple(labels.shape)}"
        )
