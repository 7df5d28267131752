"""AugMix views of a batch: mixtures of the image and of chains of simple operations on it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.transforms.affine import warp
from ttalight.transforms.checks import check_images, whole_number
from ttalight.transforms.draws import at_least_float32, draw_uniform, per_image, select
from ttalight.transforms.supervised import RandomCropFlip, RandomResizedCropFlip
from ttalight.transforms.tones import (
    autocontrast_tables,
    equalize_tables,
    look_up,
    posterize_tables,
    solarize_tables,
    to_tones,
)

#: The operations in the order of their numbers: first those on tones, then those on places.
OPERATIONS = (
    "autocontrast", "equalize", "solarize", "posterize",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_TONES = 4
_GREY = 128 / 255


class AugMixViews(nn.Module):
    """Random views: a crop and a flip, mixed with chains of up to three operations each.

    D. Hendrycks et al., *AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty*, ICLR 2020,
    arXiv 1912.02781, with the operations and strengths of M. Zhang, S. Levine, C. Finn, *MEMO: Test Time Robustness via
    Adaptation and Augmentation*, NeurIPS 2022, arXiv 2110.09506: autocontrast, equalise, solarise, posterise, turn,
    shear and shift, all of the least severity. The mixture's weights are drawn from Dirichlet(1, 1, 1), the image's
    share from Beta(1, 1). All views of all images are made at once: a step of a chain is one table look-up and one
    warp, of which each view does its own. Differences to the authors' code: warped views are not rounded to 8 bits,
    what moves in is grey (theirs is red, from one number for three channels), and shifts go with the image's side.

    Args:
        crop: ``padded`` for a crop after zero padding by 4 pixels (CIFAR), ``resized`` for a random resized crop
            (ImageNet).
        chains: Number of chains.
        depth: Greatest number of operations in a chain.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, crop: Literal["padded", "resized"] = "padded", chains: int = 3, depth: int = 3) -> None:
        super().__init__()
        if crop not in ("padded", "resized"):
            raise InputError(f"crop must be 'padded' or 'resized', got {crop!r}")
        self.crop = RandomCropFlip(padding=4) if crop == "padded" else RandomResizedCropFlip()
        self.chains = whole_number("chains", chains, 1)
        self.depth = whole_number("depth", depth, 1)

    def forward(self, images: Tensor, generator: torch.Generator | None = None, views: int = 32) -> Tensor:
        """Make ``views`` random views of every image.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1].
            generator: Source of all draws; None uses the default generator of the images' device.
            views: Number of views an image.

        Returns:
            (views * B, 3, H, W) in the dtype of the images (square after a resized crop): rows 0 .. B-1 are the first
            view, B .. 2B-1 the second.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their shape or ``views`` is wrong.
        """
        check_images(images)
        repeated = at_least_float32(images).repeat(whole_number("views", views, 1), 1, 1, 1)
        cropped: Tensor = self.crop(repeated, generator)
        count, chains, depth = len(cropped), self.chains, self.depth
        draws = draw_uniform(count * chains, 2 + 3 * depth, generator, cropped.device)
        weights = -torch.log1p(-draws[:, 0]).view(chains, count)  # exponential: their shares are Dirichlet(1, ..., 1)
        length = (draws[:, 1] * depth).long()
        made = cropped.repeat(chains, 1, 1, 1)
        for step, drawn in enumerate(draws[:, 2:].reshape(-1, depth, 3).unbind(1)):
            kind, level, sign = drawn.unbind(1)
            changed = augment(made, (kind * len(OPERATIONS)).long(), 0.1 + 0.9 * level, sign < 0.5)
            made = select(step <= length, changed, made)
        shares = weights / weights.sum(0)
        mixed = (made.view(chains, *cropped.shape) * shares[..., None, None, None].to(made.dtype)).sum(0)
        own = per_image(draw_uniform(count, 1, generator, cropped.device)[:, 0].to(made.dtype))
        return mixed.lerp(cropped, own).to(images.dtype)


def augment(images: Tensor, operation: Tensor, level: Tensor, negative: Tensor) -> Tensor:
    """Do one operation of AugMix on every image, each its own.

    Args:
        images: (B, 3, H, W) float32 or float64 in [0, 1].
        operation: (B,) places in ``OPERATIONS``.
        level: (B,) strengths in [0, 10].
        negative: (B,) bool, whether turns, shears and shifts go the other way.

    Returns:
        (B, 3, H, W).
    """
    tones = to_tones(images)
    tables = torch.stack(
        (
            autocontrast_tables(tones),
            equalize_tables(tones),
            solarize_tables(256 - (level * 25.6).long()),
            posterize_tables(4 - (level * 0.4).long()),
        ),
        dim=1,
    )
    rows = torch.arange(len(images), device=images.device)
    toned = look_up(tones, tables[rows, operation.clamp(max=_TONES - 1)]).to(images.dtype)
    moved = warp(images, _matrices(images, operation, level, negative), _GREY)
    return select(operation < _TONES, toned, moved)


def _matrices(images: Tensor, operation: Tensor, level: Tensor, negative: Tensor) -> Tensor:
    height, width = images.shape[2:]
    sign = 1.0 - 2.0 * negative.to(level.dtype)
    zero = torch.zeros_like(level)

    def only(name: str, value: Tensor) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), sign * value, zero)

    turn = only("rotate", (level * 3).floor() * (math.pi / 180))
    across, along = only("shear_x", level * 0.03), only("shear_y", level * 0.03)
    right, down = (
        only(name, (level * (side / 30)).floor()) for name, side in (("translate_x", width), ("translate_y", height))
    )
    cos, sin = turn.cos(), turn.sin()
    # Shears hold the upper or left edge of the image where it is, turns its centre.
    top = torch.stack((cos, across - sin, right + across * (height / 2)), dim=1)
    bottom = torch.stack((sin + along, cos, down + along * (width / 2)), dim=1)
    return torch.stack((top, bottom), dim=1)
