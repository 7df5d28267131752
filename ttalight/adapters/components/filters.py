"""Filters and weights of samples that published methods share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttalight.losses.entropy import is_masked

__all__ = [
    "confidence_weight",
    "entropy_margin",
    "entropy_margins",
    "image_probabilities",
    "probability_drop",
    "redundancy",
    "update_mean",
]


def entropy_margin(fraction: float, classes: int) -> float:
    """Return a margin on the entropy, in nats, as a fraction of the largest one, ln C, of the classifier's own C."""
    return fraction * math.log(classes)


def entropy_margins(fraction: float, logits: Tensor) -> Tensor:
    """Return the margin of each image, (B,), as a fraction of ln C, where C counts the classes that are not masked.

    No host synchronisation. Where nothing is masked it is exactly that of ``entropy_margin``.

    Args:
        fraction: Of the largest entropy.
        logits: (B, C) or (B, C, ...), masked classes as ``is_masked`` finds them; pixels of an image are averaged.
    """
    classes = logits.shape[1]
    masked = is_masked(logits).sum(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    left = torch.log1p(masked / -classes)  # ln of the share of classes that are left, exactly 0 for all of them
    left = left.flatten(1).mean(1) if left.ndim > 1 else left
    return entropy_margin(fraction, classes) + fraction * left


def confidence_weight(entropies: Tensor, margin: float | Tensor) -> Tensor:
    """Return exp(E0 - H): certain samples count more; no gradient.

    S. Niu et al., *Efficient Test-Time Model Adaptation without Forgetting*, ICML 2022, arXiv 2204.02610.

    Args:
        entropies: H, (B,).
        margin: E0, of all or of each, (B,).
    """
    return (margin - entropies.detach()).exp()


def redundancy(probabilities: Tensor, mean: Tensor) -> Tensor:
    """Return the cosine of each prediction to the running mean of predictions, (B,).

    Same source as ``confidence_weight``. NaN while the mean is unset.

    Args:
        probabilities: (B, C).
        mean: (C,), NaN while unset.
    """
    # Distributions are never zero, so there is nothing to guard the division against.
    lengths = torch.linalg.vector_norm(probabilities, dim=1) * torch.linalg.vector_norm(mean)
    cosines: Tensor = (probabilities @ mean.to(probabilities.dtype)) / lengths
    return cosines


@torch.no_grad()
def image_probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities of each image, (B, C), of dense predictions the mean over places.

    Args:
        logits: (B, C) or (B, C, ...).
    """
    probabilities = logits.softmax(1)
    return probabilities.flatten(2).mean(2) if logits.ndim > 2 else probabilities


@torch.no_grad()
def update_mean(mean: Tensor, probabilities: Tensor, kept: Tensor, momentum: float = 0.9) -> None:
    """Update the running mean of predictions, in place, by the mean of those kept; nothing kept changes nothing.

    Args:
        mean: (C,), NaN while unset: the first mean is taken as it is.
        probabilities: (B, C).
        kept: Mask, (B,).
        momentum: Share of the old mean.
    """
    new = (torch.where(kept[:, None], probabilities, 0).sum(0) / kept.sum()).to(mean.dtype)  # NaN where nothing is kept
    moved = mean.lerp(new, 1 - momentum)  # NaN unless both are numbers; fmax then takes the one that is
    torch.where(moved.isnan(), mean.fmax(new), moved, out=mean)


def probability_drop(logits: Tensor, changed: Tensor) -> Tensor:
    """Return how much the likeliest class of an image loses when the image's objects are destroyed, (B,), in [-1, 1].

    J. Lee et al., *Entropy is not Enough for Test-Time Adaptation: From the Perspective of Disentangled Factors*,
    ICLR 2024, arXiv 2403.07366, where it is called the pseudo-label probability difference (PLPD).

    Args:
        logits: Of the images, (B, C).
        changed: Of the images with shuffled patches or the like, (B, C).
    """
    likely = logits.argmax(1, keepdim=True)
    return (logits.softmax(1).gather(1, likely) - changed.softmax(1).gather(1, likely))[:, 0]
