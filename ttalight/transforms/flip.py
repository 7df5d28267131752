"""Mirroring left to right with a chance of its own for every image."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.transforms.checks import check_images, check_rows, probability
from ttalight.transforms.draws import draw_mask, per_image


def horizontal_flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images that a mask names.

    Args:
        images: (B, 3, H, W) float.
        flip: (B,) bool.

    Returns:
        (B, 3, H, W), every value copied.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong.
    """
    check_images(images)
    check_rows("flip", flip, len(images))
    return torch.where(per_image(flip), images.flip(3), images)


def random_horizontal_flip(images: Tensor, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Mirror every image with probability ``p``.

    Args:
        images: (B, 3, H, W) float.
        p: Chance for each image.
        generator: Source of the draws; None uses the device's default generator.

    Returns:
        (B, 3, H, W).

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If their shape or ``p`` is wrong.
    """
    check_images(images)
    return horizontal_flip(images, draw_mask(len(images), probability("p", p), generator, images.device))
