"""Snow and fog."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ttalight.data.corruptions.draws import normal, uniform
from ttalight.data.corruptions.motion import smear
from ttalight.data.corruptions.pixels import luma, separable, to_uint8, zoom_matrix


def snow(
    images: Tensor,
    mean: float,
    scale: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    keep: float,
    *,
    generator: Generator,
) -> Tensor:
    """Add wind-blown flakes and whiten the image.

    Args:
        images: uint8 (N, 3, H, W).
        mean: Mean of the Gaussian noise that the flakes are cut from.
        scale: Its standard deviation.
        zoom: Enlargement of the flakes.
        threshold: Noise below is no flake.
        radius: Half the number of taps of the flakes' motion blur in pixels.
        sigma: Standard deviation of the motion blur in pixels.
        keep: Share of the image that is not whitened.
        generator: Source of the noise and the wind's direction.

    Returns:
        uint8 tensor of the same shape.
    """
    count, _, height, width = images.shape
    noise = normal((count, height, width), generator).mul_(scale).add_(mean)
    angles = uniform((count,), -135, -45, generator, torch.float64)
    flakes = separable(
        noise.to(images.device), *(zoom_matrix(side, zoom).to(images.device) for side in (height, width))
    )
    flakes = to_uint8(flakes.masked_fill_(flakes < threshold, 0).mul_(255))
    flakes = to_uint8(smear(flakes[:, None].float(), angles, radius, sigma)).float()
    levels = images.float()
    white = luma(levels).mul_(1.5).add_(127.5).maximum(levels)
    return to_uint8(levels.mul_(keep).add_(white, alpha=1 - keep).add_(flakes).add_(flakes.flip(-2, -1)))


def fog(images: Tensor, thickness: float, decay: float, *, generator: Generator) -> Tensor:
    """Add a random cloud (`plasma`) of height ``thickness`` and scale the brightest value back to what it was."""
    count, _, height, width = images.shape
    side = max(2, 1 << (max(height, width) - 1).bit_length())
    draws = uniform((count, side * side - 1), -1, 1, generator).to(images.device)
    cloud = plasma(draws, side, decay)[:, None, :height, :width]
    levels = images.float()
    brightest = levels.amax(dim=(1, 2, 3), keepdim=True)
    foggy = levels.add_(cloud, alpha=255 * thickness)
    return to_uint8(foggy.mul_(brightest / (brightest + 255 * thickness)))


def plasma(draws: Tensor, side: int, decay: float) -> Tensor:
    """Fractal height maps by the diamond-square algorithm on a torus.

    Args:
        draws: Uniform numbers in [-1, 1), shape (N, side * side - 1), used from the coarsest level on: centres of
            squares, then middles of horizontal and of vertical edges.
        side: Side of the map, a power of two, at least 2.
        decay: The noise amplitude falls by this factor with every level (the noise itself by its square).

    Returns:
        Float tensor of shape (N, side, side); every map's minimum is 0 and maximum 1.
    """
    height = draws.new_zeros(len(draws), side, side)
    step, wobble, used = side, 100.0, 0
    while step >= 2:
        half = step // 2
        grid = side // step
        noise = draws[:, used : used + 3 * grid * grid].view(-1, 3, grid, grid) * wobble**2
        used += 3 * grid * grid
        corner = height[:, ::step, ::step]
        pairs = corner + corner.roll(-1, 1)
        centre = (pairs + pairs.roll(-1, 2)) / 4 + noise[:, 0]
        height[:, half::step, half::step] = centre
        height[:, ::step, half::step] = (centre + centre.roll(1, 1) + corner + corner.roll(-1, 2)) / 4 + noise[:, 1]
        height[:, half::step, ::step] = (centre + centre.roll(1, 2) + corner + corner.roll(-1, 1)) / 4 + noise[:, 2]
        step, wobble = half, wobble / decay
    height -= height.amin(dim=(1, 2), keepdim=True)
    return height.div_(height.amax(dim=(1, 2), keepdim=True))
