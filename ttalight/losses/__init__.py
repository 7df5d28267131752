"""Losses: pure functions of tensors, and thin modules around them."""

from ttalight.losses.alignment import AlignmentLoss, alignment_loss
from ttalight.losses.barlow_twins import barlow_twins_loss
from ttalight.losses.class_alignment import class_alignment, hybrid_targets
from ttalight.losses.clustering import clustering_loss
from ttalight.losses.consistency import consistency_loss
from ttalight.losses.contrastive import ContrastiveLoss, contrastive_loss
from ttalight.losses.decoupled import decoupled_entropy
from ttalight.losses.entropy import entropy
from ttalight.losses.likelihood import flow_likelihood_loss
from ttalight.losses.masked_patches import masked_patch_loss
from ttalight.losses.moments import (
    MomentAlignment,
    MomentSummary,
    covariance_distance,
    feature_moments,
    mean_distance,
)
from ttalight.losses.multi_view import multi_view_contrastive_loss
from ttalight.losses.noise_contrast import in_distribution_loss, noise_contrastive_loss, noise_logits
from ttalight.losses.opinion import opinion_entropy
from ttalight.losses.queue_contrast import queue_contrastive_loss
from ttalight.losses.reconstruction import mutual_divergence, reconstruction_loss
from ttalight.losses.self_training import (
    generalized_cross_entropy,
    marginal_entropy,
    soft_likelihood_ratio,
    symmetric_cross_entropy,
)
from ttalight.losses.structural import entropy_slopes, structural_alignment
from ttalight.losses.text_alignment import prototype_losses, transductive_loss

__all__ = [
    "AlignmentLoss",
    "ContrastiveLoss",
    "MomentAlignment",
    "MomentSummary",
    "alignment_loss",
    "barlow_twins_loss",
    "class_alignment",
    "clustering_loss",
    "consistency_loss",
    "contrastive_loss",
    "covariance_distance",
    "decoupled_entropy",
    "entropy",
    "entropy_slopes",
    "feature_moments",
    "flow_likelihood_loss",
    "generalized_cross_entropy",
    "hybrid_targets",
    "in_distribution_loss",
    "marginal_entropy",
    "masked_patch_loss",
    "mean_distance",
    "multi_view_contrastive_loss",
    "mutual_divergence",
    "noise_contrastive_loss",
    "noise_logits",
    "opinion_entropy",
    "prototype_losses",
    "queue_contrastive_loss",
    "reconstruction_loss",
    "soft_likelihood_ratio",
    "structural_alignment",
    "symmetric_cross_entropy",
    "transductive_loss",
]
