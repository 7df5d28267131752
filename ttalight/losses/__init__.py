"""Losses: pure functions of tensors, and thin modules around them."""

from ttalight.losses.alignment import AlignmentLoss, alignment_loss
from ttalight.losses.contrastive import ContrastiveLoss, contrastive_loss
from ttalight.losses.entropy import entropy
from ttalight.losses.self_training import (
    generalized_cross_entropy,
    marginal_entropy,
    soft_likelihood_ratio,
    symmetric_cross_entropy,
)

__all__ = [
    "AlignmentLoss",
    "ContrastiveLoss",
    "alignment_loss",
    "contrastive_loss",
    "entropy",
    "generalized_cross_entropy",
    "marginal_entropy",
    "soft_likelihood_ratio",
    "symmetric_cross_entropy",
]
