"""Gradients of the entropy in closed form, and their alignment with anchors that the classifier's weights give."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.losses.entropy import bounded, log_probabilities

__all__ = ["entropy_slopes", "predicted_slopes", "structural_alignment", "structural_anchors", "structural_logits"]


def entropy_slopes(logits: Tensor) -> Tensor:
    """Derivative of the softmax's entropy H by each logit: -p (log p + H).

    It is the ascent direction, sums to zero over classes and does not change when all logits move together. Through
    the classifier, ``slopes @ weight`` is the derivative by the feature: minus the covariance, under p, of logits and
    rows.

    Args:
        logits: (N, C).

    Returns:
        (N, C).
    """
    log_p = bounded(log_probabilities(logits))
    p = log_p.exp()
    return -p * (log_p - (p * log_p).sum(1, keepdim=True))


def predicted_slopes(logits: Tensor, classes: Tensor) -> Tensor:
    """Derivative of one class's share of the entropy, -p_k log p_k, by each logit.

    By logit j it is -p_k (log p_k + 1) ([j = k] - p_j); its sign turns where p_k = 1/e.

    Args:
        logits: (N, C).
        classes: k of each row, (N,).

    Returns:
        (N, C).
    """
    log_p = bounded(log_probabilities(logits))
    own = log_p.gather(1, classes[:, None])
    one = torch.zeros_like(log_p).scatter(1, classes[:, None], 1)
    return -own.exp() * (own + 1) * (one - log_p.exp())


def structural_logits(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits of pseudo-features, (K, C).

    Args:
        features: Classifier rows, as they are or scaled, (K, D).
        weight: The classifier, (C, D).
        bias: (C,); none by default.
    """
    logits = features @ weight.T
    return logits if bias is None else logits + bias


def structural_anchors(
    slopes: Tensor, classes: Tensor, features: Tensor, weight: Tensor, space: str = "feature"
) -> Tensor:
    """Gradients of the entropy that rows of the classifier have as pseudo-features, (K, D).

    Args:
        slopes: Derivatives by the logits of the pseudo-features, (K, C).
        classes: The class k whose row each pseudo-feature is, (K,).
        features: The pseudo-features, (K, D).
        weight: The classifier, (C, D).
        space: ``feature`` takes the derivative by the pseudo-feature, with the classifier constant; ``weight_row`` the
            one by row k of the classifier, with the pseudo-feature constant; ``total`` the sum of both, since row k
            is one and the other.
    """
    if space == "feature":
        return slopes @ weight
    rows = slopes.gather(1, classes[:, None]) * features
    return rows if space == "weight_row" else slopes @ weight + rows


def structural_alignment(gradients: Tensor, anchors: Tensor, smallest: float = 1e-6) -> Tensor:
    """One minus the cosine between gradients and anchors, (N,), in [0, 2].

    Pairs of which one is shorter than ``smallest`` have no direction worth following: they give 0, without gradient.

    Args:
        gradients: (N, D).
        anchors: (N, D); constants.
        smallest: Norm below which a vector counts as none.
    """
    clear = (_norm(gradients.detach()) >= smallest) & (_norm(anchors) >= smallest)
    # The derivative of a norm at zero is NaN, and NaN * 0 is NaN: replace before, not after.
    gradients = torch.where(clear[:, None], gradients, torch.ones_like(gradients))
    anchors = torch.where(clear[:, None], anchors, torch.ones_like(anchors))
    cosines = (gradients * anchors).sum(1) / (_norm(gradients) * _norm(anchors))
    return torch.where(clear, 1 - cosines, torch.zeros_like(cosines))


def _norm(vectors: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norm
