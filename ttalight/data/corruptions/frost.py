"""Frost: a random piece of a picture of ice, mixed into the image.

The pictures of the reference carry no author and no licence, so they are not part of this package: textures that
have the pictures' colours, contrast and roughness stand in for them unless ``frost_dir`` names a folder that holds the
originals. Results depend on which of the two was used; `frost_source` gives the word to record.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from ttalight.data.corruptions.draws import integers, normal, uniform
from ttalight.data.corruptions.pixels import interpolation_matrix, separable, to_uint8
from ttalight.data.pictures import read_picture
from ttalight.errors import InputError, MissingFileError

FROST_PROCEDURAL = "procedural"
"""Value of `frost_source` for the built-in textures."""

FROST_PICTURES = "pictures"
"""Value of `frost_source` for the original pictures."""

FROST_FILES: tuple[str, ...] = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""The pictures that a ``frost_dir`` must hold; the reference has a sixth that its code never draws."""

_SIDE = 640  # of the textures, before they are scaled
_SLOPE = 0.65  # grain: amplitude falls with the frequency to this power
_SOFTNESS = 0.42  # grain: Gaussian blur in pixels
_SLOWEST = 2.3  # uneven light: up to this many waves across the texture
_SEED = 20190327

# Mean colour, gain per channel, and standard deviations of uneven light and of grain: together they have the means of
# the five pictures and their spread inside and between 32-pixel crops at scale 0.2. Neighbours are a little more
# alike than in the pictures: Gaussian grain as rough as theirs misleads a network by 4 points more.
_TEXTURES = (
    ((77, 149, 165), (1.5, 0.9, 0.85), 15.4, 9.3),
    ((198, 202, 212), (1.0, 1.0, 1.0), 13.5, 16.0),
    ((198, 202, 212), (1.0, 1.0, 1.0), 13.5, 16.0),
    ((143, 157, 170), (1.0, 1.0, 1.0), 14.7, 24.3),
    ((102, 113, 125), (1.0, 1.0, 1.0), 23.0, 32.0),
)


def frost_source(frost_dir: str | None) -> str:
    """Say which frost is in use, `FROST_PROCEDURAL` or `FROST_PICTURES`, so that results can record it."""
    return FROST_PROCEDURAL if frost_dir is None else FROST_PICTURES


def frost(
    images: Tensor,
    image_weight: float,
    frost_weight: float,
    scale: float,
    *,
    generator: Generator,
    frost_dir: str | None = None,
) -> Tensor:
    """Mix each image with a random piece of one of five pictures of frost.

    Args:
        images: uint8 (N, 3, H, W).
        image_weight: Factor of the image.
        frost_weight: Factor of the frost.
        scale: The pictures are shrunk to this fraction of their size.
        generator: Source of the choice of picture and place.
        frost_dir: Folder with `FROST_FILES`, or None for procedural textures.

    Returns:
        uint8 tensor of the same shape.

    Raises:
        FileNotFoundError: If ``frost_dir`` lacks a file.
        ValueError: If a picture, shrunk, is not larger than the images. (Textures repeat and serve any size.)
    """
    count, _, height, width = images.shape
    pictures = _textures(scale) if frost_dir is None else _pictures(frost_dir, scale)
    choice = integers((count,), 0, len(pictures), generator)
    place = uniform((count, 2), 0, 1, generator, torch.float64)
    ice = torch.empty(images.shape, dtype=torch.float32)
    for index, picture in enumerate(pictures):
        tall, wide = picture.shape[-2:]
        room = (tall, wide) if frost_dir is None else (tall - height, wide - width)
        if min(room) < 1:
            raise InputError(
                f"{FROST_FILES[index]} has {tall} x {wide} pixels after scaling by {scale}, too few for images of "
                f"{height} x {width}: choose the table made for this image size"
            )
        chosen = (choice == index).nonzero().squeeze(1)
        start = (place[chosen] * torch.tensor(room)).long()
        rows = (start[:, :1] + torch.arange(height)) % tall
        columns = (start[:, 1:] + torch.arange(width)) % wide
        ice[chosen] = picture[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    return to_uint8(ice.to(images.device).mul_(frost_weight).add_(images, alpha=image_weight))


@lru_cache(maxsize=4)
def _pictures(frost_dir: str, scale: float) -> tuple[Tensor, ...]:
    folder = Path(frost_dir)
    missing = [name for name in FROST_FILES if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"no {', '.join(missing)} in frost_dir {frost_dir!r}: copy frost1.png to frost5.jpg from "
            "ImageNet-C/create_c of github.com/hendrycks/robustness, or leave frost_dir out for procedural textures"
        )
    pictures = []
    for name in FROST_FILES:
        picture = torch.from_numpy(np.array(read_picture(folder / name, ("PNG", "JPEG"), "copy it again")))
        pictures.append(_shrink(picture.permute(2, 0, 1).float(), scale))
    return tuple(pictures)


def _shrink(picture: Tensor, scale: float) -> Tensor:
    """Read a picture at every ``1 / scale``-th pixel, linear between neighbours, without smoothing first."""
    rows, columns = (
        interpolation_matrix((np.arange(round(side * scale)) + 0.5) / scale - 0.5, side) for side in picture.shape[-2:]
    )
    return separable(picture, rows, columns).round_()


@lru_cache(maxsize=4)
def _textures(scale: float) -> tuple[Tensor, ...]:
    """Five textures that repeat seamlessly, the same in every run: uneven light plus grain, float (3, side, side)."""
    generator = Generator("cpu").manual_seed(_SEED)
    frequency = torch.hypot(torch.fft.fftfreq(_SIDE)[:, None], torch.fft.rfftfreq(_SIDE))
    frequency[0, 0] = torch.inf
    slow = (frequency * _SIDE <= _SLOWEST).float()
    rough = frequency.pow(-_SLOPE) * (-2 * (torch.pi * _SOFTNESS * frequency) ** 2).exp()
    textures = []
    for mean, gain, light, grain in _TEXTURES:
        relief = light * _noise(slow, generator) + grain * _noise(rough, generator)
        colours = torch.tensor(mean).view(3, 1, 1) + torch.tensor(gain).view(3, 1, 1) * relief
        textures.append(_shrink(colours.clamp_(0, 255), scale))
    return tuple(textures)


def _noise(amplitude: Tensor, generator: Generator) -> Tensor:
    """Periodic Gaussian noise with the given spectrum, standard deviation 1."""
    white = normal((_SIDE, _SIDE), generator)
    noise: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=white.shape)
    return noise.div_(noise.std())
