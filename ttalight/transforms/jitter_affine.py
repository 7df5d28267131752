"""The strong augmentation that robust mean teachers and their kin compare predictions under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.transforms.affine import affine_matrices, warp
from ttalight.transforms.blur import draw_sigmas, gaussian_blur
from ttalight.transforms.checks import check_images, positive_range, probability
from ttalight.transforms.color import (
    JitterParameters,
    adjust_gamma,
    check_jitter,
    color_jitter,
    draw_color_jitter,
)
from ttalight.transforms.draws import at_least_float32, draw_uniform
from ttalight.transforms.flip import random_horizontal_flip


class RandomJitterAffineFlip(nn.Module):
    """Random colour jitter with gamma, turn, shift, scale and flip, drawn for every image; blur and noise on request.

    The augmentation of R. Marsden, M. Döbler, B. Yang, *Universal Test-time Adaptation through Weight Ensembling,
    Diversity Weighting, and Prior Correction*, WACV 2024, arXiv 2306.00650. ``with_blur_and_noise`` makes that of Q.
    Wang et al., *Continual Test-Time Domain Adaptation*, CVPR 2022, arXiv 2203.13591. Two differences: the authors draw
    one augmentation for a whole batch, here every image has its own; and they blur a padded image before cropping it,
    here the crop is blurred.

    Args:
        jitter: Strengths of brightness, contrast, saturation and hue; see `draw_color_jitter`.
        gamma: The exponent is uniform in [1 - gamma, 1 + gamma]; it comes at a random place among the jitter's
            operations. In [0, 1).
        degrees: Greatest angle.
        translate: Greatest shift in whole pixels, as a share of the image's sides.
        scale: Least and greatest factor of size.
        flip: Chance of mirroring left to right.
        outside: What moves in: the image's ``reflection`` or its ``border``.
        blur: Least and greatest standard deviation in pixels of a blur 5 pixels wide; None does not blur.
        noise: Standard deviation of Gaussian noise.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        jitter: Sequence[float] = (0.4, 0.3, 0.5, 0.06),
        gamma: float = 0.3,
        degrees: float = 15.0,
        translate: float = 1 / 8,
        scale: Sequence[float] = (0.9, 1.1),
        flip: float = 0.5,
        outside: Literal["reflection", "border"] = "reflection",
        blur: Sequence[float] | None = None,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.jitter = check_jitter(jitter)
        if not 0 <= gamma < 1:
            raise InputError(f"gamma must lie in [0, 1), got {gamma}")
        if degrees < 0 or translate < 0 or noise < 0:
            raise InputError(f"degrees, translate and noise must be at least 0, got {degrees}, {translate} and {noise}")
        if outside not in ("reflection", "border"):
            raise InputError(f"outside must be 'reflection' or 'border', got {outside!r}")
        self.gamma, self.degrees, self.translate, self.noise = gamma, degrees, translate, noise
        self.scale = positive_range("scale", scale)
        self.flip = probability("flip", flip)
        self.outside: Literal["reflection", "border"] = outside
        self.blur = None if blur is None else positive_range("blur", blur)

    @classmethod
    def with_blur_and_noise(cls) -> RandomJitterAffineFlip:
        """Return the augmentation of CoTTA, RoTTA, SANTA and RMT."""
        return cls(outside="border", blur=(0.001, 0.5), noise=0.005)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1]; values outside are clipped.
            generator: Source of all draws; None uses the default generator of the images' device.

        Returns:
            (B, 3, H, W) in [0, 1] in the dtype of the images.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their shape is wrong.
        """
        check_images(images)
        made = self._colors(at_least_float32(images).clamp(0, 1), generator)
        made = warp(made, self._matrices(made, generator), self.outside)
        if self.blur is not None:
            made = gaussian_blur(made, draw_sigmas(len(made), self.blur, generator, made.device), 5)
        made = random_horizontal_flip(made, self.flip, generator)
        if self.noise:
            source = made.device if generator is None else generator.device
            drawn = torch.randn(made.shape, generator=generator, device=source, dtype=torch.float32)
            made = made + self.noise * drawn.to(made)
        return made.clamp(0, 1).to(images.dtype)

    def _colors(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        count, device = len(pixels), pixels.device
        parameters = draw_color_jitter(count, self.jitter, generator=generator, device=device)
        if not self.gamma:
            return color_jitter(pixels, parameters)
        draws = draw_uniform(count, 2, generator, device)
        exponents = 1 + self.gamma * (2 * draws[:, 0] - 1)
        before, after = split_jitter(parameters, (5 * draws[:, 1]).long())
        return color_jitter(adjust_gamma(color_jitter(pixels, before), exponents), after)

    def _matrices(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        draws = draw_uniform(len(pixels), 4, generator, pixels.device)
        angle, right, down = (2 * draws[:, :3] - 1).unbind(1)
        height, width = pixels.shape[2:]
        shifts = torch.stack((right * (self.translate * width), down * (self.translate * height)), dim=1).round()
        low, high = self.scale
        return affine_matrices(self.degrees * angle, shifts, low + (high - low) * draws[:, 3])


def split_jitter(parameters: JitterParameters, place: Tensor) -> tuple[JitterParameters, JitterParameters]:
    """Split a jitter in two, so that something else can come in between.

    Args:
        parameters: Of B images.
        place: (B,) how many of an image's four operations belong to the first part.

    Returns:
        The parameters of both parts; in each, the operations of the other do nothing.
    """
    turns = parameters.order.argsort(1)  # when each operation has its turn
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for operation, (name, values) in enumerate(zip(parameters._fields[:4], parameters[:4], strict=True)):
        if values is not None:
            neutral = 0.0 if name == "hue" else 1.0
            early = turns[:, operation] < place
            first[name] = torch.where(early, values, neutral)
            second[name] = torch.where(early, neutral, values)
    return parameters._replace(**first), parameters._replace(**second)
