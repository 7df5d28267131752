"""Losses that align the image features of a batch with text features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["prototype_losses", "transductive_loss"]


def prototype_losses(features: Tensor, classes: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return how well class means of image features agree with the text features, and how far apart they are.

    The mean m_c is taken over the images of each class that the batch has, K of them. The agreement is the mean over
    these classes of m_c · t_c. The separation is the sum over ordered pairs of different classes of 1 - cos(m_c, m_c').
    Both are to be maximised.

    Source: S. K. Maharana et al., *BATCLIP: Bimodal Online Test-Time Adaptation for CLIP*, ICCV 2025, arXiv 2412.02837:
    the projection matching loss and the loss of class separability.

    Args:
        features: Of the images, (B, D), of any length.
        classes: Predicted class of each, int64 (B,).
        texts: Unit vectors of all classes, (C, D).

    Returns:
        Two scalars.
    """
    members = F.one_hot(classes, len(texts)).to(features.dtype)
    counts = members.sum(0)
    is_present = (counts > 0).to(features.dtype)
    present = is_present.sum()
    means = members.T @ features / counts.clamp(min=1)[:, None]
    agreement = (means * texts).sum() / present
    total = F.normalize(means, dim=1).sum(0)  # the rows of absent classes are zero
    return agreement, present.square() - total.square().sum()


def transductive_loss(features: Tensor, texts: Tensor, scale: float | Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy between the similarities of images and texts and those within images and within texts.

    Image i is paired with text i. With the unit vectors f_i and t_i the predictions are p_i = softmax_j(scale f_i·t_j),
    the targets q_ij = softmax_i((f_i·f_j + t_i·t_j) / (2 temperature)), and the loss of image i is -Σ_j q_ij log p_ij.
    Gradients pass through both.

    Source: G. A. Vargas Hakim et al., *CLIPArTT: Adaptation of CLIP to New Domains at Test Time*, WACV 2025,
    arXiv 2405.00754. The formula leaves open over which index targets are normalised, and whether they have gradients.
    Here both are as in the code of D. Osowiechi et al., *WATT: Weight Average Test-Time Adaptation of CLIP*,
    NeurIPS 2024, arXiv 2406.13875, which has the same loss.

    Args:
        features: Unit vectors of the images, (B, D).
        texts: Unit vectors of the text of each image, (B, D).
        scale: Factor on the cosines in the predictions.
        temperature: Of the targets, above 0.

    Returns:
        (B,).
    """
    targets = ((features @ features.T + texts @ texts.T) / (2 * temperature)).softmax(0)
    log_p: Tensor = torch.log_softmax(scale * features @ texts.T, dim=1)
    return -(targets * log_p).sum(1)
