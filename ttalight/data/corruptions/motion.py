"""Smearing along a line, as ImageMagick's motion blur does it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def smear(levels: Tensor, angles: Tensor, radius: float, sigma: float) -> Tensor:
    """Average every pixel with those ahead of it in one direction, Gaussian weights falling with the distance.

    The kernel has ``2 * radius + 1`` taps at whole-pixel offsets and starts at the pixel itself; edge pixels are
    repeated outside the image. Images are treated in the order of their angles, because neighbours in that order
    share most offsets: a tap is then a few additions of shifted stacks instead of one gather per pixel.

    Args:
        levels: Float images, shape (N, C, H, W).
        angles: One direction per image in degrees, clockwise from the positive x axis, float64 on the CPU, shape (N,).
        radius: Half the number of taps in pixels.
        sigma: Standard deviation of the weights in pixels.

    Returns:
        Float tensor of shape (N, C, H, W).
    """
    height, width = levels.shape[-2:]
    weights = _weights(radius, sigma)
    order = angles.argsort(stable=True)
    offsets = _offsets(angles[order], len(weights))
    low, high = offsets.amin(dim=(0, 1)).clamp_(max=0).tolist(), offsets.amax(dim=(0, 1)).clamp_(min=0).tolist()
    place = order.to(levels.device)
    padded = F.pad(levels[place], (-low[0], high[0], -low[1], high[1]), mode="replicate")
    total = torch.zeros_like(levels, memory_format=torch.contiguous_format)
    for tap, weight in enumerate(weights):
        shared, counts = torch.unique_consecutive(offsets[:, tap], dim=0, return_counts=True)
        start = 0
        for (x, y), count in zip(shared.tolist(), counts.tolist(), strict=True):
            rows, columns = slice(y - low[1], y - low[1] + height), slice(x - low[0], x - low[0] + width)
            total[start : start + count].add_(padded[start : start + count, :, rows, columns], alpha=weight)
            start += count
    smeared = torch.empty_like(total)
    smeared[place] = total
    return smeared


def _weights(radius: float, sigma: float) -> list[float]:
    taps = np.exp(-0.5 * (np.arange(2 * int(np.ceil(radius)) + 1) / sigma) ** 2)
    weights: list[float] = (taps / taps.sum()).tolist()
    return weights


def _offsets(angles: Tensor, length: int) -> Tensor:
    """Whole-pixel (x, y) of every tap, halves rounded down: shape (N, length, 2)."""
    radians = angles.deg2rad()
    direction = torch.stack((radians.cos(), radians.sin()), dim=-1)
    steps = torch.arange(length, dtype=angles.dtype)
    return (steps[:, None] * direction[:, None] - 0.5).ceil().long()
