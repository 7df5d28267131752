"""NC-TTT's losses: telling small from large noise, and looking like small noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ttalight.errors import InputError

__all__ = ["in_distribution_loss", "noise_contrastive_loss", "noise_logits"]


def noise_logits(noise: Tensor, small: float, large: float) -> Tensor:
    """Logit of the probability that Gaussian noise has the larger of two standard deviations.

    With equal priors the posterior's logit is (1 / small^2 - 1 / large^2) n.n / 2 - D log(large / small), D being the
    noise's dimension. In many dimensions it is far from 0, so that the posterior is 0 or 1 in practice; as a logit
    it neither overflows nor loses its order.

    Args:
        noise: (B, D) or (B, ...), of which all dimensions but the first are one.
        small: The smaller standard deviation.
        large: The larger one.

    Returns:
        (B,).

    Raises:
        ValueError: Unless 0 < small < large.
    """
    if not 0 < small < large:
        raise InputError(f"standard deviations must satisfy 0 < small < large, got small={small}, large={large}")
    noise = (noise if noise.dtype == torch.float64 else noise.float()).flatten(1)
    squares = noise.square().sum(1)
    return 0.5 * (small**-2 - large**-2) * squares - noise.shape[1] * math.log(large / small)


def noise_contrastive_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of a discriminator's scores with soft labels, both given as logits.

    Source: D. Osowiechi et al., *NC-TTT: A Noise Contrastive Approach for Test-Time Training*, CVPR 2024, arXiv
    2404.08392.

    Args:
        scores: (B,), the discriminator's logits.
        targets: (B,), logits of the labels; see ``noise_logits``.

    Returns:
        (B,).

    Raises:
        ValueError: If the shapes differ: a column (B, 1) against a row would be B x B comparisons.
    """
    if scores.shape != targets.shape or scores.ndim != 1:
        raise InputError(
            f"expected scores and targets of one shape (B,), got {tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return binary_cross_entropy_with_logits(scores, targets.to(scores.dtype).sigmoid(), reduction="none")


def in_distribution_loss(scores: Tensor) -> Tensor:
    """Binary cross-entropy of a discriminator's scores with the label of small noise, 0: log(1 + exp(score)).

    Args:
        scores: (B,), the discriminator's logits.

    Returns:
        (B,).
    """
    return softplus(scores if scores.dtype == torch.float64 else scores.float())
