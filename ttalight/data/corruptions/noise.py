"""Additive, multiplicative, counting and salt-and-pepper noise."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ttalight.data.corruptions.draws import normal, uniform
from ttalight.data.corruptions.pixels import to_uint8


def gaussian_noise(images: Tensor, scale: float, *, generator: Generator) -> Tensor:
    """Add independent Gaussian noise to every value; ``scale`` is its standard deviation for images in [0, 1]."""
    noise = normal(images.shape, generator).to(images.device)
    return to_uint8(noise.mul_(255 * scale).add_(images))


def shot_noise(images: Tensor, photons: float, *, generator: Generator) -> Tensor:
    """Replace every value by a Poisson count whose mean is ``photons`` at full brightness."""
    counts = torch.poisson(images.cpu().float().mul_(photons / 255), generator=generator).to(images.device)
    return to_uint8(counts.mul_(255 / photons))


def impulse_noise(images: Tensor, amount: float, *, generator: Generator) -> Tensor:
    """Set a fraction ``amount`` of all values to black or white with equal chance, each channel by itself."""
    draw = uniform(images.shape, 0, 1, generator).to(images.device)
    white = (draw > 1 - amount / 2).to(torch.uint8).mul_(255)
    return white.bitwise_or_(images).mul_(draw >= amount / 2)


def speckle_noise(images: Tensor, scale: float, *, generator: Generator) -> Tensor:
    """Multiply every value by one plus Gaussian noise of standard deviation ``scale``."""
    noise = normal(images.shape, generator).to(images.device)
    return to_uint8(noise.mul_(scale).add_(1).mul_(images))
