"""Losses: pure functions of tensors, and thin modules around them."""

from ttalight.losses.alignment import AlignmentLoss, alignment_loss
from ttalight.losses.class_alignment import class_alignment, hybrid_targets
from ttalight.losses.contrastive import ContrastiveLoss, contrastive_loss
from ttalight.losses.entropy import entropy
from ttalight.losses.self_training import (
    generalized_cross_entropy,
    marginal_entropy,
    soft_likelihood_ratio,
    symmetric_cross_entropy,
)
from ttalight.losses.structural import (
    entropy_slopes,
    predicted_slopes,
    structural_alignment,
    structural_anchors,
    structural_logits,
)

__all__ = [
    "AlignmentLoss",
    "ContrastiveLoss",
    "alignment_loss",
    "class_alignment",
    "contrastive_loss",
    "entropy",
    "entropy_slopes",
    "generalized_cross_entropy",
    "hybrid_targets",
    "marginal_entropy",
    "predicted_slopes",
    "soft_likelihood_ratio",
    "structural_alignment",
    "structural_anchors",
    "structural_logits",
    "symmetric_cross_entropy",
]
