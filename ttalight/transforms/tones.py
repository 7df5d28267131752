"""Operations on the 256 tones of 8-bit images, as tables: one look-up serves a batch in which each image does its own.

Equal to the functions of the same name in ``PIL.ImageOps``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.transforms.checks import check_images, check_rows
from ttalight.transforms.draws import at_least_float32

TONES = 256


def to_tones(images: Tensor) -> Tensor:
    """Return the nearest of 256 tones of every value, int64.

    Args:
        images: (B, 3, H, W) float in [0, 1]; values outside count as 0 or 1.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If their shape is wrong.
    """
    check_images(images)
    return (at_least_float32(images) * (TONES - 1)).round().clamp(0, TONES - 1).long()


def look_up(tones: Tensor, tables: Tensor) -> Tensor:
    """Replace every tone by what the table of its image and channel says.

    Args:
        tones: (B, 3, H, W) int64 in [0, 256).
        tables: (B, 3, 256) tones.

    Returns:
        (B, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: If the shape of the tables is wrong.
    """
    check_rows("tables", tables, len(tones), (tones.shape[1], TONES))
    return (tables.gather(2, tones.flatten(2)).view_as(tones) / (TONES - 1)).float()


def posterize_tables(bits: Tensor) -> Tensor:
    """Return tables that keep the highest bits of each tone.

    Args:
        bits: (B,) int64 from 0 to 8.

    Returns:
        (B, 3, 256) int64.
    """
    step = (1 << (8 - bits))[:, None]
    tone = torch.arange(TONES, device=bits.device)
    return (tone - tone % step)[:, None].expand(-1, 3, -1)


def solarize_tables(thresholds: Tensor) -> Tensor:
    """Return tables that invert the tones from a threshold on.

    Args:
        thresholds: (B,) int64 from 0 to 256.

    Returns:
        (B, 3, 256) int64.
    """
    tone = torch.arange(TONES, device=thresholds.device)
    return torch.where(tone < thresholds[:, None], tone, TONES - 1 - tone)[:, None].expand(-1, 3, -1)


def autocontrast_tables(tones: Tensor) -> Tensor:
    """Return tables that stretch the tones of every channel to the whole range; a channel of one tone stays.

    ``PIL.ImageOps.autocontrast`` computes in floating point and may come out one tone lower.

    Args:
        tones: (B, 3, H, W) int64.

    Returns:
        (B, 3, 256) int64.
    """
    low, high = tones.flatten(2).aminmax(dim=2, keepdim=True)
    tone = torch.arange(TONES, device=tones.device)
    stretched = (tone - low).clamp(min=0) * (TONES - 1) // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.clamp(max=TONES - 1), tone)


def equalize_tables(tones: Tensor) -> Tensor:
    """Return tables that make the tones of every channel equally frequent.

    Args:
        tones: (B, 3, H, W) int64.

    Returns:
        (B, 3, 256) int64.
    """
    flat = tones.flatten(2)
    counts = torch.zeros(*flat.shape[:2], TONES, dtype=torch.int64, device=tones.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    greatest = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, greatest)) // (TONES - 1)
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=TONES - 1)
    return torch.where(step > 0, table, torch.arange(TONES, device=tones.device))
