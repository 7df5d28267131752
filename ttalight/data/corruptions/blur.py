"""Blurs: out of focus, through frosted glass, by motion, by zooming, Gaussian."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor

from ttalight.data.corruptions.draws import integers, uniform
from ttalight.data.corruptions.motion import smear
from ttalight.data.corruptions.pixels import (
    gaussian_matrix,
    pad_mirrored,
    require_sides,
    separable,
    single_precision,
    to_uint8,
    zoom_matrix,
)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of ``sigma`` pixels, the edge pixel repeated outside."""
    return to_uint8(_smooth(images, sigma))


def _smooth(images: Tensor, sigma: float) -> Tensor:
    rows, columns = (gaussian_matrix(side, sigma).to(images.device) for side in images.shape[-2:])
    return separable(images.float(), rows, columns)


def defocus_blur(images: Tensor, radius: float, alias_blur: float) -> Tensor:
    """Blur with a disc of ``radius`` pixels whose rim is softened by a Gaussian of ``alias_blur`` pixels."""
    kernel = disc(radius, alias_blur).to(images.device)
    reach = len(kernel) // 2
    require_sides(images, reach + 1, "defocus_blur")
    padded = pad_mirrored(images.float(), reach)
    sides = padded.shape[-2:]
    # The disc has both mirror symmetries, so convolution and correlation are the same.
    spectrum = torch.fft.rfft2(padded).mul_(torch.fft.rfft2(kernel, s=sides))
    # The kernel starts in the corner, which shifts the result; what wraps around falls outside the cut.
    blurred = torch.fft.irfft2(spectrum, s=sides)[..., 2 * reach :, 2 * reach :]
    return to_uint8(blurred.contiguous())


@lru_cache(maxsize=16)
def disc(radius: float, alias_blur: float) -> Tensor:
    """The kernel of `defocus_blur`: float, square with an odd side, without empty margins.

    Its sum is one except for radii 8 and 10, where the authors' rim is mirrored at the border of the kernel: such
    images become 1 % brighter, here as there.
    """
    reach, soften = (8, 1) if radius <= 8 else (int(radius), 2)
    axis = np.arange(-reach, reach + 1)
    kernel = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    kernel /= kernel.sum()
    taps = np.exp(-0.5 * (np.arange(-soften, soften + 1) / alias_blur) ** 2)
    taps /= taps.sum()
    for _ in range(2):
        mirrored = np.pad(kernel, ((0, 0), (soften, soften)), mode="reflect")
        kernel = sum(tap * mirrored[:, i : i + len(axis)] for i, tap in enumerate(taps)).T
    filled = np.abs(axis)[kernel.any(axis=0)].max()
    inside = slice(reach - filled, reach + filled + 1)
    kernel = kernel[inside, inside]
    return single_precision(kernel.reshape(1, -1)).view(kernel.shape)


def motion_blur(images: Tensor, radius: float, sigma: float, *, generator: Generator) -> Tensor:
    """Smear each image along its own direction, at most 45 degrees from the horizontal."""
    angles = uniform((len(images),), -45, 45, generator, torch.float64)
    return to_uint8(smear(images.float(), angles, radius, sigma))


def zoom_blur(images: Tensor, stop: float, step: float) -> Tensor:
    """Average the image with enlargements of its middle by 1, 1 + step, ... up to ``stop``.

    Sides that differ are enlarged each about its own middle (the authors' code knows square images only).
    """
    levels = images.float().flatten(0, 1)
    total = levels.clone()
    terms = 1
    for count, rows, columns in _zooms(*levels.shape[-2:], stop, step):
        wide = levels @ columns.to(images.device).T
        total.baddbmm_(rows.to(images.device).expand(len(levels), -1, -1), wide, alpha=count)
        terms += count
    return to_uint8(total.div_(terms)).view(images.shape)


@lru_cache(maxsize=8)
def _zooms(height: int, width: int, stop: float, step: float) -> tuple[tuple[int, Tensor, Tensor], ...]:
    """The matrices of all zoom factors; factors that crop a small image alike are one entry with a count."""
    found: dict[bytes, tuple[int, Tensor, Tensor]] = {}
    for factor in np.arange(1, stop, step).tolist():
        rows, columns = zoom_matrix(height, factor), zoom_matrix(width, factor)
        key = rows.numpy().tobytes() + columns.numpy().tobytes()
        count = found[key][0] if key in found else 0
        found[key] = (count + 1, rows, columns)
    return tuple(found.values())


def glass_blur(images: Tensor, sigma: float, reach: float, rounds: float, *, generator: Generator) -> Tensor:
    """Blur, let every pixel copy one within ``reach`` pixels, ``rounds`` times over, and blur again.

    The authors mean to swap pixels, but exchange two views of one array, which only copies; so do we.
    """
    height, width = images.shape[-2:]
    reach, rounds = int(reach), int(rounds)
    require_sides(images, 2 * reach + 1, "glass_blur")
    shape = (len(images), rounds, height - 2 * reach, width - 2 * reach, 2)
    offsets = integers(shape, -reach, reach, generator)
    source = copied_from(offsets, height, width, reach).to(images.device)
    blurred = to_uint8(_smooth(images, sigma)).flatten(2)
    shuffled = blurred.gather(2, source[:, None].expand_as(blurred)).view(images.shape)
    return to_uint8(_smooth(shuffled, sigma))


def copied_from(offsets: Tensor, height: int, width: int, reach: int) -> Tensor:
    """Follow the copies of `glass_blur` to where each pixel's colour comes from.

    A round visits the pixels from the bottom right to the top left, leaving a margin, and each copies the pixel at
    its offset. A pixel that was visited before (it lies further on in reading order) has its new colour already, so
    chains of copies within a round are followed by doubling.

    Args:
        offsets: (row, column) offsets from ``-reach`` to ``reach - 1``, int64, shape (N, rounds, H - 2 * reach,
            W - 2 * reach, 2); the first entry of the grid belongs to pixel (reach + 1, reach + 1).
        height: H.
        width: W.
        reach: Margin, and bound of the offsets.

    Returns:
        Index into the flattened image for every pixel, int64, shape (N, H * W).
    """
    pixels = torch.arange(height * width).view(height, width)
    rows, columns = slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1)
    visited = torch.zeros(height, width, dtype=torch.bool)
    visited[rows, columns] = True
    source = pixels.flatten().expand(len(offsets), -1)
    for step in offsets.unbind(1):
        partner = pixels.repeat(len(offsets), 1, 1)
        partner[:, rows, columns] += step[..., 0] * width + step[..., 1]
        partner = partner.flatten(1)
        chained = visited.flatten()[partner] & (partner > pixels.flatten())
        last = torch.where(chained, partner, pixels.flatten())
        while not torch.equal(last, further := last.gather(1, last)):
            last = further
        source = source.gather(1, partner.gather(1, last))
    return source
