"""The contrastive loss among several views of every image."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.losses.similarity import check_temperature, unit_vectors

__all__ = ["multi_view_contrastive_loss"]


def multi_view_contrastive_loss(views: Tensor, temperature: float) -> Tensor:
    """Contrast each view with all other views of the batch, where those of the same image are the positives.

    For an anchor u of an image with V views the term is the mean, over its V - 1 other views v, of
    -log(exp(sim(u, v)/t) / sum_h exp(sim(u, h)/t)), where sim is the cosine and h runs over the V B views of the batch
    except u itself. The loss of an image is the mean of the terms of its V views. With two views its mean over the
    batch is ``contrastive_loss``. A batch of one image is finite: all candidates are positives then, and the loss is
    smallest where all views are equal.

    Similarities are float32 even for half-precision input and under autocast (float64 stays float64). Zero vectors have
    similarity 0 to everything and no gradient.

    Source: P. Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020, arXiv 2004.11362, Eq. 2, where every
    image is a class of its own.

    Args:
        views: (B, V, D), V views of B images, V at least 2. Any floating type; need not be normalised.
        temperature: t > 0.

    Returns:
        (B,), float32 or float64.

    Raises:
        ValueError: If there are fewer than two views, or the temperature is not positive.
    """
    check_temperature(temperature)
    if views.ndim != 3 or views.shape[1] < 2:
        raise InputError(f"expected views of shape (batch, two views or more, dimension), got {tuple(views.shape)}")
    with torch.autocast(views.device.type, enabled=False):
        count = views.shape[1]
        units = unit_vectors(views.flatten(0, 1))
        similarities = units @ units.T / temperature
        own = torch.eye(len(units), dtype=torch.bool, device=units.device)
        normalizers = similarities.masked_fill(own, -torch.inf).logsumexp(1).view(-1, count)
        pairs = units.view(-1, count, units.shape[1])
        pairs = pairs @ pairs.transpose(1, 2) / temperature
        positives = (pairs.sum(2) - pairs.diagonal(dim1=1, dim2=2)) / (count - 1)
        return (normalizers - positives).mean(1)
