"""The likelihood of features under a normalising flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttalight.errors import InputError

__all__ = ["flow_likelihood_loss"]


def flow_likelihood_loss(latents: Tensor, log_det: Tensor) -> Tensor:
    """Negative log-likelihood per dimension, in nats, of what a flow turned into latents.

    By the change of variables ``log p(x) = log N(z; 0, I) + log |det dz/dx|``. Half precision is taken to float32
    first.

    Source: D. Osowiechi et al., *TTTFlow: Unsupervised Test-Time Training with Normalizing Flow*, WACV 2023, arXiv
    2210.11389. As in the authors' code, the sum over the D dimensions is divided by D.

    Args:
        latents: z, (B, D) or (B, ...), of which all dimensions but the first are one.
        log_det: Logarithm of the absolute determinant of dz/dx, (B,).

    Returns:
        (B,). There is no lower bound: features that do not vary have an infinite density.

    Raises:
        ValueError: If there is not one log-determinant for each sample.
    """
    if latents.ndim < 2 or log_det.shape != latents.shape[:1]:
        raise InputError(
            f"expected latents (B, D) and log-determinants (B,), got {tuple(latents.shape)} and {tuple(log_det.shape)}"
        )
    if latents.dtype != torch.float64:
        latents, log_det = latents.float(), log_det.float()
    latents = latents.flatten(1)
    return 0.5 * (latents.square().mean(1) + math.log(2 * math.pi)) - log_det / latents.shape[1]
