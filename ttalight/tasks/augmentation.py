"""The augmentation of supervised training, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ttalight.errors import InputError
from ttalight.transforms import RandomCropFlip, RandomResizedCropFlip

__all__ = ["supervised_augmentation"]


def supervised_augmentation(
    crop: str, size: int | None, crop_scale: Sequence[float] = (0.2, 1.0), padding: int = 4, flip: float = 0.5
) -> nn.Module | None:
    """Return what training images go through; None for ``none``.

    Args:
        crop: ``resized`` (random resized crops), ``padded`` (random crops after zero padding) or ``none``.
        size: Side of resized crops in pixels; None keeps the shorter side of the input.
        crop_scale: Range of a resized crop's share of the image.
        padding: Pixels on each side for padded crops.
        flip: Probability of a horizontal flip.

    Raises:
        ValueError: If an argument is out of range.
    """
    if crop == "resized":
        return RandomResizedCropFlip(size, scale=crop_scale, flip=flip)
    if crop == "padded":
        return RandomCropFlip(padding=padding, flip=flip)
    if crop == "none":
        return None
    raise InputError(f"crop must be 'resized', 'padded' or 'none', got {crop!r}")
