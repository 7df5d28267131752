"""Colour, contrast, resampling, compression and elastic deformation."""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from ttalight.data.corruptions.draws import uniform
from ttalight.data.corruptions.pixels import gaussian_matrix, require_sides, separable, to_uint8


def brightness(images: Tensor, amount: float) -> Tensor:
    """Raise the value V of HSV by ``amount`` (images in [0, 1]); black turns grey."""
    levels = images.float()
    value = levels.amax(dim=1, keepdim=True)
    raised = (value + 255 * amount).clamp_(max=255)
    # Hue and saturation stay if all channels are scaled alike; black has none and takes the value itself.
    return to_uint8(torch.where(value > 0, levels.mul_(raised / value.clamp(min=1)), raised))


def saturate(images: Tensor, factor: float, offset: float) -> Tensor:
    """Replace the saturation S of HSV by ``S * factor + offset``, clipped to [0, 1].

    Grey pixels have hue 0, as in scikit-image, and turn red where the new saturation is above zero.
    """
    levels = images.float()
    value = levels.amax(dim=1, keepdim=True)
    missing = value - levels
    chroma = missing.amax(dim=1, keepdim=True)
    wanted = (chroma / value.clamp(min=1)).mul_(factor).add_(offset).clamp_(0, 1).mul_(value)
    grey = chroma == 0
    colour = missing.mul_(wanted / chroma.clamp(min=1))
    colour[:, 1:] += wanted * grey
    return to_uint8(value - colour)


def contrast(images: Tensor, factor: float) -> Tensor:
    """Scale every channel's distance from its mean over the image by ``factor``."""
    levels = images.float()
    means = levels.mean(dim=(-2, -1), keepdim=True)
    return to_uint8(levels.mul_(factor).add_(means, alpha=1 - factor))


def elastic_transform(images: Tensor, alpha: float, sigma: float, shift: float, *, generator: Generator) -> Tensor:
    """Deform the image by a random affine map, and then by a smooth random displacement of every pixel.

    Lengths are fractions of the shorter side.

    Args:
        images: uint8 (N, 3, H, W).
        alpha: Strength of the displacement.
        sigma: Standard deviation of the Gaussian that smooths it.
        shift: The three points that define the affine map move by up to this much in x and in y.
        generator: Source of the point shifts and displacements.

    Returns:
        uint8 tensor of the same shape.
    """
    count, _, height, width = images.shape
    side = min(height, width)
    require_sides(images, 3, "elastic_transform")
    corners = uniform((count, 3, 2), -1, 1, generator, torch.float64).mul_(shift * side)
    levels = warp_affine(images.float(), corners)
    if alpha:
        field = uniform((count, 2, height, width), -1, 1, generator).to(images.device)
        rows, columns = (
            gaussian_matrix(length, sigma * side, truncate=3, mirror=True).to(images.device)
            for length in (height, width)
        )
        levels = displace(levels, separable(field, rows, columns).mul_(alpha * side))
    return to_uint8(levels)


def warp_affine(levels: Tensor, shifts: Tensor) -> Tensor:
    """Move three points of every image and the plane with them; outside, the image is mirrored, edges not doubled.

    Args:
        levels: Float images, shape (N, C, H, W).
        shifts: By how many pixels (x, y) the points move, float64 on the CPU, shape (N, 3, 2). The points lie a third
            of the shorter side from the middle: to the lower right, the upper right and the upper left.

    Returns:
        Float tensor of shape (N, C, H, W), read by bilinear interpolation.
    """
    height, width = levels.shape[-2:]
    arm = min(height, width) // 3
    middle = torch.tensor((width // 2, height // 2), dtype=torch.float64)
    points = middle + arm * torch.tensor(((1, 1), (1, -1), (-1, -1)), dtype=torch.float64)
    moved = torch.cat((points + shifts, torch.ones(len(shifts), 3, 1, dtype=torch.float64)), dim=-1)
    back = torch.linalg.solve(moved, points.expand(len(shifts), -1, -1))
    scale = 2 / torch.tensor((width - 1, height - 1), dtype=torch.float64)
    back = (back * scale - torch.tensor(((0.0,), (0.0,), (1.0,)), dtype=torch.float64)).float().to(levels.device)
    grid = torch.matmul(_homogeneous(height, width, levels.device), back).view(-1, height, width, 2)
    return F.grid_sample(levels, grid, padding_mode="reflection", align_corners=True)


def displace(levels: Tensor, field: Tensor) -> Tensor:
    """Read every pixel at a displaced position, bilinear; outside, the image is mirrored with edge pixels doubled.

    Args:
        levels: Float images, shape (N, C, H, W).
        field: Displacement in x and in y in pixels, shape (N, 2, H, W).

    Returns:
        Float tensor of shape (N, C, H, W).
    """
    height, width = levels.shape[-2:]
    scale = field.new_tensor((2 / width, 2 / height))
    still = _homogeneous(height, width, levels.device)[:, :2].add(0.5).mul(scale).sub(1).view(height, width, 2)
    grid = torch.addcmul(still, field.permute(0, 2, 3, 1), scale)
    return F.grid_sample(levels, grid, padding_mode="reflection", align_corners=False)


def _homogeneous(height: int, width: int, device: torch.device) -> Tensor:
    """Pixel positions (x, y, 1) in reading order: shape (H * W, 3)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x, y, torch.ones_like(x)), dim=-1).view(-1, 3).float().to(device)


def pixelate(images: Tensor, factor: float) -> Tensor:
    """Shrink both sides to ``factor`` of their length with a box filter and enlarge again by repeating pixels.

    As in Pillow each pass rounds, the one along the width first.
    """
    require_sides(images, math.ceil(1 / factor), "pixelate")
    rows, columns = (_box_matrix(side, factor).to(images.device) for side in images.shape[-2:])
    levels = (images.float() @ columns.T).add_(0.5).floor_().flatten(0, 1)
    levels = torch.bmm(rows.expand(len(levels), -1, -1), levels).add_(0.5)
    return levels.to(torch.uint8).view(images.shape)


@lru_cache(maxsize=32)
def _box_matrix(size: int, factor: float) -> Tensor:
    """Shrink a line to ``int(size * factor)`` samples and enlarge it again: shape (size, size)."""
    small = int(size * factor)
    return torch.from_numpy(_box_filter(small, size) @ _box_filter(size, small)).float()


def _box_filter(size: int, new_size: int) -> np.ndarray:
    """Pillow's box filter: equal weights for the samples in a box as wide as a new sample, but at least one.

    A sample may lie on the rim of a box, and then one rounding decides, so this keeps Pillow's order of operations.
    """
    scale = size / new_size
    width = max(scale, 1.0)
    centre = (np.arange(new_size)[:, None] + 0.5) * scale
    sample = np.arange(size)
    reachable = (sample >= np.trunc(centre - 0.5 * width + 0.5)) & (sample < np.trunc(centre + 0.5 * width + 0.5))
    distance = (sample - centre + 0.5) * (1 / width)
    inside = reachable & (distance > -0.5) & (distance <= 0.5)
    weights: np.ndarray = inside / inside.sum(axis=1, keepdims=True)
    return weights


def jpeg_compression(images: Tensor, quality: float) -> Tensor:
    """Write every image as a JPEG file of this quality (Pillow's scale, 4:2:0) and read it back."""
    pictures = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    decoded = np.stack([_through_jpeg(picture, int(quality)) for picture in pictures])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous().to(images.device)


def _through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    with Image.open(file, formats=("JPEG",)) as decoded:
        return np.asarray(decoded)
