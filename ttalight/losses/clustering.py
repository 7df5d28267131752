"""ClusT3's loss: the information that clusters of positions hold about the maps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.losses.entropy import bounded, log_probabilities

__all__ = ["clustering_loss"]


def clustering_loss(logits: Tensor, groups: int = 1, variant: Literal["paper", "code"] = "paper") -> Tensor:
    """Loss of soft cluster assignments: each position should be certain, all clusters used alike.

    Positions of all images together are the samples. ``paper`` is the negative mutual information between position and
    cluster, mean_n H(p_n) - H(mean_n p_n). ``code`` is what the authors' code adds up instead: mean_n H(p_n) +
    KL(u || softmax(mean_n logits_n)) / K with u uniform. Half precision is taken to float32 first.

    Source: G. A. V. Hakim et al., *ClusT3: Information Invariant Test-Time Training*, ICCV 2023, arXiv 2310.12345. The
    authors' code reads maps (B, K, H, W) as (K, B * H * W) without moving the cluster dimension first, which mixes
    samples and clusters; here clusters are dimension 1 in both variants.

    Args:
        logits: (B, groups * K, ...), such as maps (B, groups * K, H, W); each group of K is an assignment of its own.
        groups: Number of assignments.
        variant: ``paper`` or ``code``.

    Returns:
        A scalar, the sum over the groups; with ``paper`` between -groups * log K and 0.

    Raises:
        ValueError: If the shape does not fit the groups, a group has one cluster, or the variant is unknown.
    """
    if variant not in ("paper", "code"):
        raise InputError(f"variant must be 'paper' or 'code', got {variant!r}")
    if logits.ndim < 2 or groups < 1 or logits.shape[1] % groups or logits.shape[1] // groups < 2:
        raise InputError(
            f"expected logits (B, groups * K, ...) with groups={groups} and K of 2 or more, got {tuple(logits.shape)}"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    clusters = logits.shape[1] // groups
    logits = logits.reshape(len(logits), groups, clusters, -1)
    log_p = bounded(log_probabilities(logits, dim=2))
    conditional = -(log_p.exp() * log_p).sum(2).mean((0, 2))
    if variant == "paper":
        # The mean is taken among logarithms, so that a cluster without members has a finite one.
        log_mean = log_p.logsumexp((0, 3)) - math.log(log_p.shape[0] * log_p.shape[3])
        marginal = (log_mean.exp() * log_mean).sum(1)
    else:
        log_mean = logits.mean((0, 3)).log_softmax(1)
        marginal = (-math.log(clusters) - log_mean.mean(1)) / clusters
    return (conditional + marginal).sum()
