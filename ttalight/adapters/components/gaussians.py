"""Scores of Gaussians that share a covariance, as in linear discriminant analysis."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gaussian_scores"]


def gaussian_scores(features: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    """Return log-densities of Gaussians with one covariance, without what all classes have in common, (B, C).

    Args:
        features: (B, D).
        means: (C, D).
        covariance: (D, D), of full rank.
    """
    # Without the check of solve, which waits for the device.
    directions: Tensor = torch.linalg.solve_ex(covariance, means.T)[0]
    return features @ directions - (means.T * directions).sum(0) / 2
