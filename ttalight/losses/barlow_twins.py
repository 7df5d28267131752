"""The redundancy-reduction loss between two views of every image."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.losses.similarity import check_vectors, gather_candidates

__all__ = ["barlow_twins_loss"]

EPS = 1e-5


def barlow_twins_loss(first: Tensor, second: Tensor, redundancy: float = 0.005, *, gather: bool = False) -> Tensor:
    """Bring the correlation matrix of two views' dimensions to the identity (Barlow Twins).

    c_ij is the mean over the batch of dimension i of the first view times dimension j of the second, both with mean 0
    and variance 1 over the batch (the biased variance, 1e-5 added). The loss is sum_i (1 - c_ii)^2 + r sum_{i != j}
    c_ij^2: dimensions agree between views, and say nothing that another one says. No image is a negative. Scale and
    offset of a dimension do not matter, apart from the 1e-5.

    Correlations are float32 even for half-precision input and under autocast (float64 stays float64). A dimension that
    is constant over the batch has correlation 0 with everything, and no gradient if it is so in both views.

    Source: J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, "Barlow Twins: Self-Supervised Learning via Redundancy
    Reduction", ICML 2021, arXiv 2103.03230, with r = 0.005; 1e-5 is that of the BatchNorm in the authors' code. In the
    paper it reads a projector of three layers with 8,192 outputs.

    Args:
        first: (B, D), one view of every image. Any floating type; need not be normalised.
        second: (B, D), the other view of the same images.
        redundancy: r, weight of the terms off the diagonal, at least 0.
        gather: Correlate over the batches of all ranks, B being equal on all of them. Every rank then has the loss of
            the whole batch, so that the mean over ranks, of the loss and of its gradients, is that of one process.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If shapes differ, the whole batch has fewer than two images, or the weight is negative.
    """
    if not redundancy >= 0:
        raise InputError(f"redundancy must be at least 0 (the paper has 0.005), got {redundancy}")
    check_vectors(first=first, second=second)
    with torch.autocast(first.device.type, enabled=False):
        both, _ = gather_candidates(*(_at_least_float(view) for view in (first, second)), gather=gather)
        one, two = (_standardised(view) for view in both.chunk(2))
        correlations = one.T @ two / len(one)
        diagonal = correlations.diagonal()
        off_diagonal = correlations - diagonal.diag()
        return (1 - diagonal).square().sum() + redundancy * off_diagonal.square().sum()


def _at_least_float(view: Tensor) -> Tensor:
    return view if view.dtype == torch.float64 else view.float()


def _standardised(view: Tensor) -> Tensor:
    centred = view - view.mean(0)
    return centred * (centred.square().mean(0) + EPS).rsqrt()
