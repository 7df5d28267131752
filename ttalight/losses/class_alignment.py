"""Alignment of features with the rows of a classifier, towards soft targets among the likeliest classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.losses.entropy import is_masked, log_probabilities

__all__ = ["class_alignment", "hybrid_targets"]


def hybrid_targets(similarities: Tensor, logits: Tensor, top_k: int = 10, share: float = 0.3) -> Tensor:
    """Mix, for each sample, where its feature lies with what the classifier says, over its likeliest classes.

    Among the k likeliest classes the geometric target is the softmax of minus the standardised distance 1 - s between
    feature and row, the target of confidence the renormalised prediction. Other classes have 0, as have masked ones.

    X. Chen et al., *Neural Collapse in Test-Time Adaptation*, CVPR 2026, arXiv 2512.10421.

    Args:
        similarities: Cosine s of each feature with each classifier row, (B, C).
        logits: (B, C), masked classes as ``is_masked`` finds them.
        top_k: k; at most C of them are taken.
        share: Share of confidence in [0, 1].

    Returns:
        (B, C), rows summing to 1, with gradients to both arguments.
    """
    likely, classes = log_probabilities(logits).topk(min(top_k, logits.shape[1]), dim=1)
    masked = is_masked(likely)
    count = (~masked).sum(1, keepdim=True)
    distances = (1 - similarities.gather(1, classes)).masked_fill(masked, 0)
    deviations = (distances - distances.sum(1, keepdim=True) / count).masked_fill(masked, 0)
    spread = _root(deviations.square().sum(1, keepdim=True) / count) + 1e-8
    geometric = (-deviations / spread).masked_fill(masked, -torch.inf).softmax(1)
    mixed = (1 - share) * geometric + share * likely.softmax(1)
    # Zero says that a class is none of the likeliest.
    mixed = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).masked_fill(masked, 0)
    return mixed.new_zeros(logits.shape).scatter(1, classes, mixed)


def class_alignment(similarities: Tensor, targets: Tensor) -> Tensor:
    """Return the distance of features to the classes of soft targets, (B,): -log(sum_k q_k exp(s_k) / sum_j exp(s_j)).

    Same source as ``hybrid_targets``, whose authors call it InfoNCE, at a temperature of 1.

    Args:
        similarities: s, cosine of each feature with each classifier row, (B, C), minus infinity for a class that is
            masked.
        targets: q, (B, C), zero for classes without a target.
    """
    largest = similarities.detach().amax(1, keepdim=True)
    weights = (similarities - largest).exp()
    return weights.sum(1).log() - (targets * weights).sum(1).clamp_min(torch.finfo(weights.dtype).tiny).log()


def _root(values: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, where it has none."""
    positive = values > 0
    return torch.where(positive, values, 1.0).sqrt() * positive
