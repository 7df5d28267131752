"""Losses: pure functions of tensors, and thin modules around them."""

from ttalight.losses.alignment import AlignmentLoss, alignment_loss
from ttalight.losses.contrastive import ContrastiveLoss, contrastive_loss
from ttalight.losses.entropy import entropy

__all__ = ["AlignmentLoss", "ContrastiveLoss", "alignment_loss", "contrastive_loss", "entropy"]
