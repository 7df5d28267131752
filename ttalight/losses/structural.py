"""Gradients of the entropy in closed form, and their alignment with anchors that the classifier's weights give."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.losses.entropy import bounded, log_probabilities

__all__ = ["entropy_slopes", "structural_alignment"]


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
