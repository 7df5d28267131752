"""Consistency of the predictions of several views."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.losses.entropy import bounded, log_probabilities
from ttalight.losses.self_training import marginal_entropy

__all__ = ["consistency_loss"]


def consistency_loss(logits: Tensor, temperature: float = 0.5) -> Tensor:
    """Cross-entropy of every view to the sharpened mean prediction of its image, minus the entropy of the batch's mean.

    The target of an image is q with q_k proportional to p_k^(1/t), where p is the mean of the softmax over its views.
    No gradient flows through it. The second part keeps the classes of a batch diverse: it is the entropy of the mean
    softmax over all images and views.

    Sources: the target is that of D. Berthelot et al., *MixMatch: A Holistic Approach to Semi-Supervised Learning*,
    NeurIPS 2019, arXiv 1905.02249; the second part that of J. Liang, D. Hu, J. Feng, *Do We Really Need to Access the
    Source Data? Source Hypothesis Transfer for Unsupervised Domain Adaptation*, ICML 2020, arXiv 2002.08546.

    Args:
        logits: (V, B, C) of V views of the same B images.
        temperature: t, in (0, 1]; 1 does not sharpen.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If the shape is another, or the temperature is out of range.
    """
    if logits.ndim != 3:
        raise InputError(f"expected logits of shape (views, batch, classes), got {tuple(logits.shape)}")
    if not 0 < temperature <= 1:
        raise InputError(f"temperature must lie in (0, 1], got {temperature}")
    log_p = log_probabilities(logits, dim=2)
    with torch.no_grad():
        target = (log_p.exp().mean(0).log() / temperature).softmax(1)
    agreement = -(target * bounded(log_p)).sum(2).mean()
    return agreement - marginal_entropy(logits.flatten(0, 1))
