"""Predictions of pixels, averaged over scales of the images and their mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SCALES", "mean_over_scales", "scaled_size"]

#: Scales of Q. Wang et al., *Continual Test-Time Domain Adaptation*, CVPR 2022, arXiv 2203.13591, for segmentation.
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)

#: Networks halve the resolution so often that sides have to be multiples of this.
_LARGEST_STRIDE = 32


@torch.no_grad()
def mean_over_scales(
    predict: Callable[[Tensor, float], Tensor], images: Tensor, scales: Sequence[float] = SCALES
) -> Tensor:
    """Return the logarithm of mean probabilities over scaled images and their mirror images.

    Args:
        predict: Takes images, (B, 3, h, w), and their number of pixels as a share of the original one, and returns
            logits, (B, C, h, w).
        images: (B, 3, H, W).
        scales: Factors of the sides, at least one.

    Returns:
        (B, C, H, W); minus infinity where no view gives a class a probability.
    """
    size = (images.shape[2], images.shape[3])
    total: Tensor | None = None
    for scale in scales:
        height, width = scaled_size(size, scale)
        share = height * width / (size[0] * size[1])
        scaled = images if (height, width) == size else _resized(images, (height, width))
        views = predict(scaled, share).softmax(1) + predict(scaled.flip(3), share).softmax(1).flip(3)
        views = views if views.shape[2:] == size else _resized(views, size)
        total = views if total is None else total + views
    assert total is not None, "there is at least one scale"
    return (total / (2 * len(scales))).log()


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return height and width of a scaled image, which are multiples of the powers of two that its sides are.

    Args:
        size: Height and width.
        scale: Factor of both; sides are rounded to multiples of the largest power of two in the side, 32 and an eighth
            of the side at most.
    """
    height, width = (max(step, round(side * scale / step) * step) for side, step in ((s, _step(s)) for s in size))
    return height, width


def _step(side: int) -> int:
    largest = min(side & -side, _LARGEST_STRIDE)
    while largest > 1 and 8 * largest > side:  # a small image would hardly change otherwise
        largest //= 2
    return largest


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear")
