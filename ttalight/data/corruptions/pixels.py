"""Parts of corruptions: grey levels, and linear maps along one axis written as small matrices."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ttalight.errors import InputError

# Sums of float32 weights leave an exact grey level a hair too low, and truncation would then take a whole level.
_SLACK = 2.0**-13


def to_uint8(levels: Tensor) -> Tensor:
    """Clip grey levels to 0..255 and truncate them, as the reference does; the argument is overwritten."""
    return levels.add_(_SLACK).clamp_(0, 255).to(torch.uint8)


def require_sides(images: Tensor, least: int, corruption: str) -> None:
    """Refuse images that are too small for a corruption at the strength in use."""
    height, width = images.shape[-2:]
    if min(height, width) < least:
        raise InputError(
            f"{corruption} at this strength needs sides of at least {least} pixels, not {height} x {width}: "
            "use larger images, or the table made for small ones"
        )


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one matrix along the height and one along the width.

    Args:
        images: Float images or fields, shape (..., H, W).
        rows: Matrix of shape (H', H).
        columns: Matrix of shape (W', W).

    Returns:
        Tensor of shape (..., H', W').
    """
    wide = images @ columns.T
    flat = wide.reshape(-1, *wide.shape[-2:])
    tall = torch.bmm(rows.expand(len(flat), *rows.shape), flat)
    return tall.view(*images.shape[:-2], *tall.shape[-2:])


def single_precision(weights: np.ndarray) -> Tensor:
    """Round rows of weights to float32; the largest of each row takes the rounding error of its sum.

    Without that a flat image can lose more of a grey level than `to_uint8` forgives.
    """
    rounded = torch.from_numpy(weights).float()
    error = torch.from_numpy(weights.sum(axis=1)) - rounded.sum(dim=1, dtype=torch.float64)
    rounded[torch.arange(len(rounded)), rounded.argmax(dim=1)] += error.float()
    return rounded


def interpolation_matrix(positions: np.ndarray, size: int) -> Tensor:
    """Weights that read a line of ``size`` samples at real positions, linearly; positions are clipped to the line."""
    positions = np.clip(positions, 0, size - 1)
    left = np.minimum(np.floor(positions).astype(np.int64), max(size - 2, 0))
    matrix = np.zeros((len(positions), size))
    index = np.arange(len(positions))
    matrix[index, left] = 1 - (positions - left)
    if size > 1:
        matrix[index, left + 1] = positions - left
    return torch.from_numpy(matrix).float()


def zoom_matrix(size: int, factor: float) -> Tensor:
    """Enlarge the middle of a line by ``factor`` and cut it to ``size`` again: shape (size, size).

    The first and last sample of the cropped line stay in place (corners aligned).
    """
    crop = math.ceil(size / factor)
    start = (size - crop) // 2
    enlarged = round(crop * factor)
    trim = (enlarged - size) // 2
    step = (crop - 1) / (enlarged - 1) if enlarged > 1 else 0.0
    return interpolation_matrix(start + step * np.arange(trim, trim + size), size)


def gaussian_matrix(size: int, sigma: float, *, truncate: float = 4.0, mirror: bool = False) -> Tensor:
    """Gaussian smoothing of a line of ``size`` samples: shape (size, size).

    Args:
        size: Number of samples.
        sigma: Standard deviation in samples; 0 gives the identity.
        truncate: The kernel ends at this many standard deviations.
        mirror: Continue the line by its mirror image, the edge sample doubled, instead of repeating the edge sample.

    Returns:
        Float matrix whose rows sum to one.
    """
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offsets / sigma) ** 2) if radius else np.ones(1)
    taps /= taps.sum()
    source = np.arange(size)[:, None] + offsets
    if mirror:
        source %= 2 * size
        source = np.minimum(source, 2 * size - 1 - source)
    else:
        source = source.clip(0, size - 1)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), taps)
    return single_precision(matrix)


def pad_mirrored(images: Tensor, radius: int) -> Tensor:
    """Continue (N, C, H, W) images by ``radius`` pixels of their mirror image, the edge pixel not doubled."""
    return F.pad(images, (radius, radius, radius, radius), mode="reflect")


def luma(levels: Tensor) -> Tensor:
    """Brightness of (N, 3, H, W) images with the weights of ITU-R BT.601: shape (N, 1, H, W)."""
    red, green, blue = levels[:, 0:1], levels[:, 1:2], levels[:, 2:3]
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)
