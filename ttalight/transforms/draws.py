"""Random numbers for transforms: one row an image, from the caller's generator."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_uniform(count: int, columns: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Draw independent numbers from U[0, 1).

    Args:
        count: Number of rows, one an image.
        columns: Numbers an image.
        generator: Source of the numbers; None uses the default generator of ``device``. A generator that lives on
            another device draws there and the numbers are moved.
        device: Where the numbers are wanted.

    Returns:
        (count, columns) float32.
    """
    source = device if generator is None else generator.device
    return torch.rand(count, columns, generator=generator, device=source, dtype=torch.float32).to(device)


def draw_mask(count: int, probability: float, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Draw for every image whether something happens to it.

    Args:
        count: Number of images.
        probability: Chance of True; 0 is never and 1 is always.
        generator: See `draw_uniform`.
        device: Where the mask is wanted.

    Returns:
        (count,) bool.
    """
    return draw_uniform(count, 1, generator, device)[:, 0] < probability


def at_least_float32(images: Tensor) -> Tensor:
    """Return images in the precision the mathematics runs in: float32, or float64 where they already are."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def per_image(values: Tensor) -> Tensor:
    """View (N,) as (N, 1, 1, 1), so that it broadcasts over images."""
    return values[:, None, None, None]


def select(mask: Tensor, where_true: Tensor, where_false: Tensor) -> Tensor:
    """Take whole images from one batch or the other, bit for bit.

    Interpolating with a weight of exactly 0 or 1 returns one of its ends, several times faster on a CPU than
    ``torch.where`` with a mask that broadcasts.

    Args:
        mask: (N,) bool.
        where_true: (N, C, H, W) finite.
        where_false: (N, C, H, W) finite, same dtype.

    Returns:
        (N, C, H, W).
    """
    return torch.lerp(where_false, where_true, per_image(mask.to(where_true.dtype)))
