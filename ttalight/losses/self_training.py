"""Losses that a classifier's own predictions supervise."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.losses.entropy import bounded, entropy, expectation, log_probabilities

__all__ = [
    "generalized_cross_entropy",
    "marginal_entropy",
    "soft_likelihood_ratio",
    "symmetric_cross_entropy",
]


def generalized_cross_entropy(logits: Tensor, q: float = 0.8) -> Tensor:
    """Generalised cross-entropy (1 - p^q) / q to each sample's own most likely class.

    Between cross-entropy (q -> 0) and the mean absolute error (q = 1), where confident mistakes weigh less.
    Z. Zhang, M. Sabuncu, *Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels*, NeurIPS
    2018, arXiv 1805.07836; to the model's own labels in E. Rusak et al., *If your data distribution shifts, use
    self-learning*, TMLR 2022, arXiv 2104.12928.

    Args:
        logits: (B, C) or (B, C, ...).
        q: In (0, 1].

    Returns:
        (B,) or (B, ...), between 0 and 1 / q.

    Raises:
        ValueError: If q is out of range.
    """
    if not 0 < q <= 1:
        raise InputError(f"q must lie in (0, 1], got {q}")
    likely = log_probabilities(logits).amax(1)
    return -torch.expm1(q * likely) / q


def soft_likelihood_ratio(logits: Tensor, clip: float = 0.99) -> Tensor:
    """Soft likelihood ratio -sum p log(p / (1 - p)): its gradient does not vanish for confident predictions.

    C. Mummadi et al., *Test-Time Adaptation to Distribution Shift by Confidence Maximization and Input
    Transformation*, arXiv 2106.14999; with a probability above ``clip`` counted as ``clip``, so that the ratio stays
    bounded, in R. Marsden, M. Döbler, B. Yang, *Universal Test-time Adaptation through Weight Ensembling, Diversity
    Weighting, and Prior Correction*, WACV 2024, arXiv 2306.00650.

    Args:
        logits: (B, C) or (B, C, ...).
        clip: Largest probability, in (0, 1).

    Returns:
        (B,) or (B, ...).

    Raises:
        ValueError: If ``clip`` is out of range.
    """
    if not 0 < clip < 1:
        raise InputError(f"clip must lie in (0, 1), got {clip}")
    p = log_probabilities(logits).exp()
    limits = torch.finfo(p.dtype)
    p = p.clamp(max=min(clip, 1 - limits.eps / 2))  # the largest number below 1
    # x log x at 0 is 0; clamping keeps its derivative finite.
    return -(p * (p.clamp_min(limits.tiny).log() - torch.log1p(-p))).sum(1)


def symmetric_cross_entropy(first: Tensor, second: Tensor, share: float = 0.5) -> Tensor:
    """Cross-entropy between two predictions in both directions.

    M. Döbler, R. Marsden, B. Yang, *Robust Mean Teacher for Continual and Gradual Test-Time Adaptation*, CVPR 2023,
    arXiv 2211.13081, after Y. Wang et al., *Symmetric Cross Entropy for Robust Learning with Noisy Labels*, ICCV
    2019, arXiv 1908.06112.

    Args:
        first: Logits, (B, C) or (B, C, ...).
        second: Logits of the same shape; gradients flow to both.
        share: Share of the direction that has ``first`` as target, in [0, 1].

    Returns:
        (B,) or (B, ...).
    """
    one, two = log_probabilities(first), log_probabilities(second)
    return -(share * expectation(one, two) + (1 - share) * expectation(two, one))


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction over a dimension of views, or over a batch.

    M. Zhang, S. Levine, C. Finn, *MEMO: Test Time Robustness via Adaptation and Augmentation*, NeurIPS 2022, arXiv
    2110.09506. Over a batch it is the diversity that information maximisation rewards: J. Liang, D. Hu, J. Feng, *Do
    We Really Need to Access the Source Data?*, ICML 2020, arXiv 2002.08546.

    Args:
        logits: (B, V, C): V views of B images; (V, C) counts as one image.

    Returns:
        (B,), or a scalar for (V, C).
    """
    single = logits.ndim == 2
    # The sum over views of a class that all of them mask has no derivative, so it gets a finite logarithm.
    log_p = bounded(log_probabilities(logits.unsqueeze(0) if single else logits, dim=2))
    values = entropy(log_p.logsumexp(1))  # a softmax takes the missing log V away
    return values[0] if single else values
