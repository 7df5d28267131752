"""Alignment of features with the rows of a classifier, towards soft targets among the likeliest classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.losses.entropy import log_probabilities

__all__ = ["class_alignment", "hybrid_targets"]


def hybrid_targets(
    similarities: Tensor, logits: Tensor, top_k: int = 10, share: float = 0.3, metric: str = "cosine"
) -> Tensor:
    """Mix, for each sample, where its feature lies with what the classifier says, over its likeliest classes.

    Among the k likeliest classes the geometric target is the softmax of minus the standardised distance between
    feature and row, the target of confidence the renormalised prediction. Other classes have 0, as have masked ones.

    X. Chen et al., *Neural Collapse in Test-Time Adaptation*, CVPR 2026, arXiv 2512.10421.

    Args:
        similarities: Cosine of each feature with each classifier row, (B, C).
        logits: (B, C), minus infinity for a class that is masked.
        top_k: k; at most C of them are taken.
        share: Share of confidence in [0, 1].
        metric: ``cosine`` for the distance 1 - s, ``euclidean`` for that of the unit vectors, sqrt(2 - 2 s).

    Returns:
        (B, C), rows summing to 1, with gradients to both arguments.
    """
    likely, classes = log_probabilities(logits).topk(min(top_k, logits.shape[1]), dim=1)
    masked = likely == -torch.inf
    count = (~masked).sum(1, keepdim=True)
    distances = (1 - similarities.gather(1, classes)).masked_fill(masked, 0)
    if metric == "euclidean":
        distances = _root(2 * distances)
    deviations = (distances - distances.sum(1, keepdim=True) / count).masked_fill(masked, 0)
    spread = _root(deviations.square().sum(1, keepdim=True) / count) + 1e-8
    geometric = (-deviations / spread).masked_fill(masked, -torch.inf).softmax(1)
    mixed = (1 - share) * geometric + share * likely.softmax(1)
    # Zero says that a class is none of the likeliest.
    mixed = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).masked_fill(masked, 0)
    return mixed.new_zeros(logits.shape).scatter(1, classes, mixed)


def class_alignment(
    features: Tensor,
    rows: Tensor,
    similarities: Tensor,
    targets: Tensor,
    kind: str = "infonce",
    temperature: float = 1.0,
    margin: float = 0.2,
) -> Tensor:
    """How far features are from the classes that soft targets name, (B,).

    With s_k the similarity to class k, q its target and T the classes with a target: ``infonce`` is
    -log(sum_T q_k exp(s_k / t) / sum_all exp(s_k / t)); ``l2`` the squared distance to the direction of sum q_k w_k;
    ``triplet`` and ``hinge`` want the similarity to that direction, or sum q_k s_k, to exceed the largest similarity
    outside T by a margin. Same source as ``hybrid_targets``, whose authors use ``infonce`` at t = 1.

    Args:
        features: Of unit length, (B, D).
        rows: Of the classifier, of unit length, (C, D).
        similarities: Their products, (B, C); minus infinity for a class that is masked.
        targets: (B, C), zero outside T.
        kind: One of the four.
        temperature: t > 0 of ``infonce``.
        margin: Of ``triplet`` and ``hinge``.

    Raises:
        ValueError: If there is no class outside T for a margin to refer to.
    """
    if kind == "infonce":
        scaled = similarities / temperature
        largest = scaled.detach().amax(1, keepdim=True)
        weights = (scaled - largest).exp()
        return weights.sum(1).log() - (targets * weights).sum(1).clamp_min(torch.finfo(weights.dtype).tiny).log()
    if kind == "hinge":
        wanted = (targets * similarities.masked_fill(similarities == -torch.inf, 0)).sum(1)
    else:
        goals = F.normalize(targets @ rows, dim=1)
        if kind == "l2":
            return (features - goals).square().sum(1)
        wanted = (features * goals).sum(1)
    outside = similarities.masked_fill(targets > 0, -torch.inf).amax(1)
    return (margin - wanted + outside).clamp_min(0)


def _root(values: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, where it has none."""
    positive = values > 0
    return torch.where(positive, values, 1.0).sqrt() * positive
