"""Rotations by quarters of a turn, and which one it was."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.transforms.checks import check_images, check_rows
from ttalight.transforms.draws import draw_uniform

__all__ = ["Rotation", "rotate_quarters", "rotation_views"]

#: ``expand``: all four rotations of every image; ``random``: one of them.
Rotation = Literal["expand", "random"]


def rotate_quarters(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn every image counter-clockwise by its own number of quarters of a turn; every value is copied.

    Args:
        images: (B, 3, S, S) float.
        quarters: (B,) int64 in 0 to 3.

    Returns:
        (B, 3, S, S).

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong, or images are not square.
    """
    _check_square(images)
    check_rows("quarters", quarters, len(images))
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
    return turned[quarters, torch.arange(len(images), device=images.device)]


def rotation_views(
    images: Tensor, mode: Rotation = "expand", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Turn images and return which way each was turned, the labels of rotation prediction.

    S. Gidaris et al., *Unsupervised Representation Learning by Predicting Image Rotations*, ICLR 2018, arXiv
    1803.07728.

    Args:
        images: (B, 3, S, S) float.
        mode: ``expand``: all four rotations of every image, (4B, 3, S, S), those by k quarters in rows kB to
            (k + 1)B - 1; ``random``: one of the four for every image, drawn with equal probabilities.
        generator: Source of the draws; None uses the default generator of the images' device.

    Returns:
        The turned images, and the number of quarters of each, int64 in 0 to 3.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong, images are not square, or the mode is none of the two.
    """
    check_rotation(mode)
    _check_square(images)
    if mode == "expand":
        labels = torch.arange(4, device=images.device).repeat_interleave(len(images))
        return torch.cat([images.rot90(k, (2, 3)) for k in range(4)]), labels
    # A float32 draw lies below 1, and so does its product with 4, a power of two, below 4.
    labels = (4 * draw_uniform(len(images), 1, generator, images.device)[:, 0]).long()
    return rotate_quarters(images, labels), labels


def check_rotation(mode: str) -> None:
    """Raise ValueError unless the mode is one that ``rotation_views`` knows."""
    if mode not in get_args(Rotation):
        raise InputError(f"rotation must be one of {', '.join(get_args(Rotation))}, got {mode!r}")


def _check_square(images: Tensor) -> None:
    check_images(images)
    if images.shape[2] != images.shape[3]:
        raise InputError(
            f"rotations need square images, got {images.shape[2]} x {images.shape[3]}: crop them (image_size, or "
            "crop: resized)"
        )
