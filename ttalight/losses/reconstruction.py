"""ReC-TTT's losses: decoded maps against the maps of another encoder, and classifiers against each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ttalight.errors import InputError
from ttalight.losses.entropy import expectation, log_probabilities

__all__ = ["mutual_divergence", "reconstruction_loss"]


def reconstruction_loss(decoded: Sequence[Tensor], targets: Sequence[Tensor], alpha: float | None = None) -> Tensor:
    """Cosine distance of decoded maps from their targets, summed over scales; targets get no gradient.

    With ``alpha`` only hard positions learn: where the distance of the channel vectors is below mean + alpha * standard
    deviation (over all positions of the batch), the decoded map gets no gradient. The loss's value stays the same.

    Source: M. Colussi et al., *ReC-TTT: Contrastive Feature Reconstruction for Test-Time Training*, WACV 2025, arXiv
    2411.17869; hard positions are those of J. Guo et al., *ReContrast*, NeurIPS 2023, arXiv 2306.02602.

    Args:
        decoded: Maps (B, C, H, W), one for each scale.
        targets: Maps of the same shapes.
        alpha: Standard deviations above the mean at which a position is hard; None lets all positions learn.

    Returns:
        (B,), between 0 and twice the number of scales.

    Raises:
        ValueError: If numbers or shapes differ.
    """
    shapes = [[tuple(tensor.shape) for tensor in maps] for maps in (decoded, targets)]
    if not decoded or shapes[0] != shapes[1]:
        raise InputError(f"expected maps of the same shapes, one for each scale, got {shapes[0]} and {shapes[1]}")
    return torch.stack(
        [_distance(_full(ours), _full(theirs).detach(), alpha) for ours, theirs in zip(decoded, targets, strict=True)]
    ).sum(0)


def _distance(decoded: Tensor, target: Tensor, alpha: float | None) -> Tensor:
    if alpha is not None:
        apart = 1 - cosine_similarity(decoded.detach(), target, dim=1)
        spread = apart.std() if apart.numel() > 1 else 0.0
        easy = apart < apart.mean() + alpha * spread
        decoded = torch.where(easy.unsqueeze(1), decoded.detach(), decoded)
    return 1 - cosine_similarity(decoded.flatten(1), target.flatten(1), dim=1)


def mutual_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two classifiers in both directions; each learns from the other as it is.

    KL(q || p) with q held fixed, and KL(p || q) with p held fixed, over the classes of each sample by itself. The
    authors' code takes the softmax over the batch instead.

    Args:
        first: Logits (B, C).
        second: Logits (B, C).

    Returns:
        (B,), at least 0.

    Raises:
        ValueError: If the shapes are not (B, C) alike.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise InputError(f"expected logits of one shape (B, C), got {tuple(first.shape)} and {tuple(second.shape)}")
    log_p, log_q = log_probabilities(first), log_probabilities(second)
    fixed_p, fixed_q = log_p.detach(), log_q.detach()
    return expectation(fixed_q, fixed_q - log_p) + expectation(fixed_p, fixed_p - log_q)


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
