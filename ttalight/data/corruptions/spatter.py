"""Spatter: drops of water or of mud on the lens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ttalight.data.corruptions.draws import normal
from ttalight.data.corruptions.pixels import gaussian_matrix, pad_mirrored, require_sides, separable, to_uint8

_WATER = (175.0, 238.0, 238.0)
_MUD = (63.0, 42.0, 20.0)
_MEAN = ((1 / 9,) * 3,) * 3
_EMBOSS = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))


def spatter(
    images: Tensor,
    mean: float,
    scale: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: float,
    *,
    generator: Generator,
) -> Tensor:
    """Put drops on the image.

    Args:
        images: uint8 (N, 3, H, W).
        mean: Mean of the Gaussian noise that drops are cut from.
        scale: Its standard deviation.
        sigma: Standard deviation in pixels of the Gaussian that smooths the noise.
        threshold: Noise below is no drop.
        strength: Water: brightness of the brightest drop. Mud: standard deviation in pixels of the drops' soft rim.
        mud: 1 for opaque mud, 0 for water that brightens.
        generator: Source of the noise.

    Returns:
        uint8 tensor of the same shape.
    """
    count, _, height, width = images.shape
    noise = normal((count, height, width), generator).mul_(scale).add_(mean).to(images.device)
    liquid = _smooth(noise, sigma)
    liquid.masked_fill_(liquid < threshold, 0)
    levels = images.float()
    if mud:
        cover = _smooth((liquid > threshold).float(), strength)
        cover = cover.masked_fill_(cover < 0.8, 0)[:, None]
        return to_uint8(levels.mul_(1 - cover).add_(cover * levels.new_tensor(_MUD).view(3, 1, 1)))
    require_sides(images, 2, "spatter")
    # More than full scale wraps around, as the reference's cast does.
    drops = liquid.mul_(255).int().remainder_(256).float()
    shine = drops * shading(drops)
    shine.mul_(strength / shine.amax(dim=(1, 2), keepdim=True).clamp_(min=1))
    return to_uint8(levels.add_(shine[:, None] * levels.new_tensor(_WATER).view(3, 1, 1)))


def _smooth(field: Tensor, sigma: float) -> Tensor:
    rows, columns = (gaussian_matrix(side, sigma).to(field.device) for side in field.shape[-2:])
    return separable(field, rows, columns)


def shading(drops: Tensor) -> Tensor:
    """Light and shade of drops from the distance to their outlines, equalised and embossed.

    Args:
        drops: Whole grey levels as floats, shape (N, H, W).

    Returns:
        Whole grey levels as floats, shape (N, H, W).
    """
    distance = distance_to(outlines(drops, low=50, high=150)).clamp_(max=20)
    # The slack keeps averages that are whole numbers from losing a level; the next smaller ones are 3e-4 away.
    relief = equalise(_filter(distance, _MEAN).add_(1e-5).floor_(), levels=21)
    relief = _filter(relief, _EMBOSS).clamp_(0, 255)
    return _filter(relief, _MEAN).round_()


def _filter(field: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    """Correlate (N, H, W) fields with a 3 x 3 kernel, the border mirrored, the edge pixel not doubled."""
    padded = pad_mirrored(field[:, None], 1).squeeze(1)
    height, width = field.shape[-2:]
    total = torch.zeros_like(field)
    for y, row in enumerate(kernel):
        for x, weight in enumerate(row):
            total.add_(padded[:, y : y + height, x : x + width], alpha=weight)
    return total


def outlines(levels: Tensor, *, low: float, high: float) -> Tensor:
    """Canny's edge detector with the 3 x 3 Sobel operator and the sum of absolute derivatives as the gradient.

    J. Canny, A Computational Approach to Edge Detection, IEEE PAMI 8(6), 1986; ties and sectors as in OpenCV.

    Args:
        levels: Whole grey levels as floats, shape (N, H, W).
        low: A maximum above this is an edge if it touches one.
        high: A maximum above this is an edge.

    Returns:
        Boolean tensor of shape (N, H, W).
    """
    padded = F.pad(levels[:, None], (1, 1, 1, 1), mode="replicate").squeeze(1)
    across = padded[:, :, 2:] - padded[:, :, :-2]
    down = padded[:, 2:] - padded[:, :-2]
    x = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    y = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    gradient = x.abs() + y.abs()
    around = F.pad(gradient, (1, 1, 1, 1))

    def neighbour(rows: int, columns: int) -> Tensor:
        height, width = gradient.shape[-2:]
        return around[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    # tan(22.5 degrees) in 15 binary digits; tan(67.5 degrees) is two more.
    slope = 13573 / 32768
    flat = y.abs() < slope * x.abs()
    steep = y.abs() > (slope + 2) * x.abs()
    rising = (x < 0) ^ (y < 0)
    horizontal = (gradient > neighbour(0, -1)) & (gradient >= neighbour(0, 1))
    vertical = (gradient > neighbour(-1, 0)) & (gradient >= neighbour(1, 0))
    falling_diagonal = (gradient > neighbour(-1, -1)) & (gradient > neighbour(1, 1))
    rising_diagonal = (gradient > neighbour(-1, 1)) & (gradient > neighbour(1, -1))
    diagonal = torch.where(rising, rising_diagonal, falling_diagonal)
    peak = (gradient > low) & torch.where(flat, horizontal, torch.where(steep, vertical, diagonal))

    edges = peak & (gradient > high)
    while True:
        touched = F.max_pool2d(edges[:, None].float(), 3, stride=1, padding=1).squeeze(1) > 0
        grown = peak & touched
        if torch.equal(grown, edges):
            return edges
        edges = grown


def distance_to(targets: Tensor) -> Tensor:
    """Length of the shortest path to a target pixel over straight, diagonal and knight's moves.

    G. Borgefors, Distance Transformations in Digital Images, CVGIP 34(3), 1986: lengths 1, 1.4 and 2.1969 as
    in OpenCV.

    Args:
        targets: Boolean, shape (N, H, W).

    Returns:
        Float tensor of shape (N, H, W); infinite where an image has no target.
    """
    lengths = {1: 1.0, 2: 1.4, 5: 2.1969}
    steps = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if y * y + x * x in lengths]
    height, width = targets.shape[-2:]
    distance = torch.zeros_like(targets, dtype=torch.float32).masked_fill_(~targets, torch.inf)
    while True:
        padded = F.pad(distance, (2, 2, 2, 2), value=torch.inf)
        shorter = distance
        for y, x in steps:
            start = padded[:, 2 + y : 2 + y + height, 2 + x : 2 + x + width]
            shorter = torch.minimum(shorter, start + lengths[y * y + x * x])
        if torch.equal(shorter, distance):
            return distance
        distance = shorter


def equalise(field: Tensor, levels: int) -> Tensor:
    """Spread the histogram of each image over 0..255; an image of one level stays as it is.

    Args:
        field: Whole numbers from 0 to ``levels - 1`` as floats, shape (N, H, W).
        levels: Number of levels.

    Returns:
        Whole grey levels as floats, shape (N, H, W).
    """
    index = field.flatten(1).long()
    histogram = field.new_zeros(len(field), levels)
    histogram.scatter_add_(1, index, torch.ones_like(field).flatten(1))
    lowest = index.amin(dim=1, keepdim=True)
    start = histogram.gather(1, lowest)
    rest = index.shape[1] - start
    table = ((histogram.cumsum(dim=1) - start) * (255 / rest.clamp(min=1))).round_()
    table = torch.where(rest > 0, table, lowest.float())
    return table.gather(1, index).view(field.shape)
