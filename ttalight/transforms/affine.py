"""Affine warps of a batch, every image by its own matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ttalight.errors import InputError
from ttalight.transforms.checks import check_images, check_rows
from ttalight.transforms.draws import at_least_float32, select


def affine_matrices(angles: Tensor, shifts: Tensor, scales: Tensor) -> Tensor:
    """Return the matrices for `warp` that turn, enlarge and then shift images.

    Equal to those of ``torchvision.transforms.v2.functional.affine`` without shear.

    Args:
        angles: (B,) degrees, clockwise.
        shifts: (B, 2) pixels to the right and down.
        scales: (B,) factors, above 1 enlarges.

    Returns:
        (B, 2, 3) float32.
    """
    turn = torch.deg2rad(angles)
    cos, sin = turn.cos() / scales, turn.sin() / scales
    right, down = shifts.unbind(1)
    across = torch.stack((cos, sin, -cos * right - sin * down), dim=1)
    along = torch.stack((-sin, cos, sin * right - cos * down), dim=1)
    return torch.stack((across, along), dim=1).float()


def warp(
    images: Tensor,
    matrices: Tensor,
    outside: Literal["reflection", "border"] | float = "reflection",
    applied: Tensor | None = None,
) -> Tensor:
    """Read every pixel of an image at the place that the image's matrix sends it to, bilinearly.

    Places are counted in pixels from the centre of the image, to the right and down: row 0 of a matrix times (x, y, 1)
    is where to read across, row 1 where to read down. Matrix products, and so TF32, are not used.

    Args:
        images: (B, 3, H, W) float.
        matrices: (B, 2, 3) from output to input.
        outside: What lies outside the image: its ``reflection`` (the border pixel not repeated), its ``border``, or one
            value for all channels.
        applied: (B,) bool, which images are warped; None warps all.

    Returns:
        (B, 3, H, W) in the dtype of the images.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape or ``outside`` is wrong.
    """
    check_images(images)
    check_rows("matrices", matrices, len(images), (2, 3))
    if isinstance(outside, str) and outside not in ("reflection", "border"):
        raise InputError(f"outside must be 'reflection', 'border' or a number, got {outside!r}")
    pixels = at_least_float32(images)
    height, width = pixels.shape[2:]
    rows = matrices.to(pixels.dtype)[..., None, None].unbind(1)
    x = torch.arange(width, device=pixels.device, dtype=pixels.dtype) - (width - 1) / 2
    y = torch.arange(height, device=pixels.device, dtype=pixels.dtype)[:, None] - (height - 1) / 2
    across, down = (row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in rows)
    # One pixel has no extent to divide by, and every place in it is the same.
    grid = torch.stack((across / max((width - 1) / 2, 0.5), down / max((height - 1) / 2, 0.5)), dim=3)
    padding = outside if isinstance(outside, str) else "border"
    made = functional.grid_sample(pixels, grid, "bilinear", padding, align_corners=True)
    if not isinstance(outside, str):
        inside = (across >= -width / 2) & (across < width / 2) & (down >= -height / 2) & (down < height / 2)
        made = torch.where(inside[:, None], made, outside)
    if applied is not None:
        check_rows("applied", applied, len(images))
        made = select(applied, made, pixels)
    return made.to(images.dtype)
