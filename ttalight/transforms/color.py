"""Colour jitter and greyscale of a batch, with factors and an order of operations of its own for every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.transforms.checks import check_images, check_rows, numbers, probability
from ttalight.transforms.draws import at_least_float32, draw_mask, draw_uniform, per_image, select

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class JitterParameters(NamedTuple):
    """Operations of `color_jitter` on each of N images. An operation that is None is left out.

    Attributes:
        brightness: (N,) factors >= 0, 1 changes nothing.
        contrast: (N,) factors >= 0, 1 changes nothing.
        saturation: (N,) factors >= 0, 1 changes nothing, 0 is grey.
        hue: (N,) shares of a turn in [-0.5, 0.5], 0 changes nothing.
        order: (N, 4) int64, each row a permutation: ``order[n, k]`` is the operation (0 brightness, 1 contrast,
            2 saturation, 3 hue) that comes k-th on image n.
        applied: (N,) bool, which images are jittered at all; None jitters all.
    """

    brightness: Tensor | None
    contrast: Tensor | None
    saturation: Tensor | None
    hue: Tensor | None
    order: Tensor
    applied: Tensor | None = None


def check_jitter(jitter: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the strengths of brightness, contrast, saturation and hue as a tuple.

    Raises:
        ValueError: If they are not four numbers >= 0, or hue is above 0.5.
    """
    strengths = numbers(jitter)
    if len(strengths) != 4 or not all(0.0 <= strength < float("inf") for strength in strengths) or strengths[3] > 0.5:
        raise InputError(
            f"jitter must be four numbers >= 0 (brightness, contrast, saturation, hue), hue at most 0.5; got {jitter}"
        )
    return strengths[0], strengths[1], strengths[2], strengths[3]


def draw_color_jitter(
    count: int,
    jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
    p: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> JitterParameters:
    """Draw factors, order and whether to jitter at all for every image, as torchvision's ``ColorJitter`` does for one.

    Args:
        count: Number of images.
        jitter: Strengths of brightness, contrast and saturation (factors are uniform in [max(0, 1 - s), 1 + s]) and of
            hue (uniform in [-s, s]); an operation of strength 0 is left out.
        p: Chance that an image is jittered.
        generator: Source of the draws; None uses the device's default generator.
        device: Where the parameters are wanted.

    Returns:
        Parameters for `color_jitter`; all 24 orders are equally likely.

    Raises:
        ValueError: If the strengths or ``p`` are out of range.
    """
    strengths = check_jitter(jitter)
    p = probability("p", p)
    draws = draw_uniform(count, 8, generator, device)
    bounds = [(max(0.0, 1.0 - strength), 1.0 + strength) for strength in strengths[:3]]
    bounds.append((-strengths[3], strengths[3]))
    brightness, contrast, saturation, hue = (
        low + (high - low) * draws[:, column] if strengths[column] else None
        for column, (low, high) in enumerate(bounds)
    )
    applied = draw_mask(count, p, generator, device) if p < 1.0 else None
    return JitterParameters(brightness, contrast, saturation, hue, draws[:, 4:].argsort(dim=1), applied)


def color_jitter(images: Tensor, parameters: JitterParameters) -> Tensor:
    """Change brightness, contrast, saturation and hue, every image by its own factors in its own order.

    Equal, image by image, to the float operations of ``torchvision.transforms.v2.functional`` in the same order,
    clamping after each included. Only hue is not a blend of the image with something grey, so the batch takes three
    steps of blends, the hue, and three more steps of blends; in each step an image does its own operation or rests. On
    the CPU images without a hue are left out of that step, and a single image does its own operations only, which
    gives the same numbers.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        parameters: One row an image, from `draw_color_jitter` or made by hand; values are not checked.

    Returns:
        (B, 3, H, W) in the dtype of the images; images that are not jittered come back bit for bit.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong.
    """
    check_images(images)
    check_rows("order", parameters.order, len(images), (4,))
    for name in ("brightness", "contrast", "saturation", "hue", "applied"):
        values = getattr(parameters, name)
        if values is not None:
            check_rows(name, values, len(images))

    pixels = at_least_float32(images)
    # Reading values costs nothing on the CPU. Other devices would have to wait, and a compiler would stop.
    may_look = pixels.device.type == "cpu" and not torch.compiler.is_compiling()
    if may_look and len(pixels) == 1:
        made = _jitter_one(pixels, parameters)
    else:
        made = _jitter_all(pixels, parameters, may_look)
    if parameters.applied is not None:
        made = select(parameters.applied, made, pixels)
    return made.to(images.dtype)


def _jitter_one(pixels: Tensor, parameters: JitterParameters) -> Tensor:
    """Do a single image's operations in their order, but those that change nothing."""
    values = [None if value is None else value.item() for value in parameters[:4]]
    made = pixels.clone()
    for operation in parameters.order[0].tolist():
        value = values[operation]
        if value is None or value == (0.0 if operation == HUE else 1.0):
            continue
        if operation == HUE:
            assert parameters.hue is not None
            made = _turn_hue(made, parameters.hue.to(pixels.dtype))
        elif operation == BRIGHTNESS:
            made = made.mul_(value).clamp_(0.0, 1.0)
        else:
            grey = luminance(made)
            if operation == CONTRAST:
                grey = grey.mean(dim=(1, 2, 3), keepdim=True)
            made = made.mul_(value).add_(grey.mul_(1.0 - value)).clamp_(0.0, 1.0)
    return made


def _jitter_all(pixels: Tensor, parameters: JitterParameters, may_look: bool) -> Tensor:
    """Do the operations of every image, in steps that all images take together."""
    steps = _blend_coefficients(parameters, pixels).unbind(1)
    made = pixels.clone()
    for step in steps[: len(steps) // 2]:
        made = _blend_(made, step)
    if parameters.hue is not None:
        hue = parameters.hue.to(pixels.dtype)
        turned = hue.nonzero()[:, 0] if may_look else None
        if turned is None or len(turned) == len(pixels):
            made = _turn_hue(made, hue)
        else:  # the dearest step, from which half of the images rest where a jitter was split in two
            made.index_copy_(0, turned, _turn_hue(made.index_select(0, turned), hue.index_select(0, turned)))
    for step in steps[len(steps) // 2 :]:
        made = _blend_(made, step)
    return made


def _blend_coefficients(parameters: JitterParameters, pixels: Tensor) -> Tensor:
    """Coefficients of image, its grey and its mean grey for every step: (B, steps, 3).

    The steps are those of the order before the hue and then those after it, an image resting where the other part has
    its operation; without a hue they are just those of the order. No steps if there is no blend at all.
    """
    factors = (parameters.brightness, parameters.contrast, parameters.saturation)
    if all(factor is None for factor in factors):
        return pixels.new_empty(len(pixels), 0, 3)
    neutral = pixels.new_ones(len(pixels))
    columns = [neutral if factor is None else factor.to(pixels.dtype) for factor in factors]
    order = parameters.order
    keep = torch.stack((*columns, neutral), dim=1).gather(1, order)
    if parameters.hue is not None:
        step = torch.arange(4, device=order.device)
        hue_step = (order == HUE).to(torch.uint8).argmax(dim=1, keepdim=True)
        before = torch.where(step < hue_step, keep, 1.0)[:, :3]
        after = torch.where(step > hue_step, keep, 1.0)[:, 1:]
        keep, order = torch.cat((before, after), dim=1), torch.cat((order[:, :3], order[:, 1:]), dim=1)
    rest = 1.0 - keep
    return torch.stack((keep, rest * (order == SATURATION), rest * (order == CONTRAST)), dim=2)


def _blend_(pixels: Tensor, coefficients: Tensor) -> Tensor:
    """Replace the images by their sum with their grey and mean grey, clamped to [0, 1]."""
    keep, to_grey, to_mean = (per_image(column) for column in coefficients.unbind(1))
    grey = luminance(pixels)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    grey = grey.mul_(to_grey).add_(mean.mul_(to_mean))
    return pixels.mul_(keep).add_(grey).clamp_(0.0, 1.0)


def adjust_hue(images: Tensor, hue: Tensor) -> Tensor:
    """Turn the hue of every image by its own angle, keeping HSV saturation and value.

    Equal to ``torchvision.transforms.v2.functional.adjust_hue`` image by image; grey pixels keep their value.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        hue: (B,) shares of a full turn in [-0.5, 0.5].

    Returns:
        (B, 3, H, W) in the dtype of the images.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong.
    """
    check_images(images)
    check_rows("hue", hue, len(images))
    pixels = at_least_float32(images)
    return _turn_hue(pixels, hue.to(pixels.dtype)).to(images.dtype)


def _turn_hue(pixels: Tensor, hue: Tensor) -> Tensor:
    """Hue rotation without branches: measure each pixel's angle in sixths of a turn, add, and read it back.

    With channels scaled so that the smallest is 0 and the largest 1, the angle counted from red towards the side of
    green is 1 - red + green + blue, and towards the side of blue it is the same with a minus sign. A channel is at its
    greatest within one sixth of a turn of its own primary and falls linearly to its least over the next sixth.
    """
    red, green, blue = pixels.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    angle = (value - red).add_(green - least).add_(blue - least)
    # Grey pixels have no angle; their chroma of 0 keeps it from mattering.
    angle = torch.copysign(angle.div_(chroma.clamp(min=1e-12)), green - blue) + 6.0 * hue[:, None, None]
    # The complements of red, green and blue lie at 3, 5 (= -1) and 1 sixths; there a channel is at its least.
    opposite = 3.0 - 4.0 * torch.arange(3, device=pixels.device, dtype=pixels.dtype)
    away = angle[:, None] - opposite[:, None, None]
    away = away.sub_((away * (1.0 / 6.0)).round_(), alpha=6.0).abs_()
    return away.sub_(2.0).clamp_(-1.0, 0.0).mul(chroma[:, None]).add_(value[:, None])


def luminance(pixels: Tensor) -> Tensor:
    """Weighted sum of the channels with ITU-R BT.601's weights as torchvision rounds them, (B, 1, H, W)."""
    red, green, blue = pixels.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def grayscale(images: Tensor, applied: Tensor | None = None) -> Tensor:
    """Replace the three channels by their luminance.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        applied: (B,) bool, which images lose their colour; None means all.

    Returns:
        (B, 3, H, W) in the dtype of the images.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong.
    """
    check_images(images)
    pixels = at_least_float32(images)
    grey = luminance(pixels).expand_as(pixels)
    if applied is not None:
        check_rows("applied", applied, len(images))
        grey = select(applied, grey, pixels)
    return grey.to(images.dtype).contiguous()


def random_grayscale(images: Tensor, p: float = 0.2, generator: torch.Generator | None = None) -> Tensor:
    """Take the colour from every image with probability ``p``.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        p: Chance for each image.
        generator: Source of the draws; None uses the device's default generator.

    Returns:
        (B, 3, H, W).

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If their shape or ``p`` is wrong.
    """
    check_images(images)
    return grayscale(images, draw_mask(len(images), probability("p", p), generator, images.device))


def adjust_gamma(images: Tensor, gamma: Tensor) -> Tensor:
    """Raise the values of every image to a power of its own: above 1 darkens, below 1 brightens.

    Args:
        images: (B, 3, H, W) float in [0, 1]; values outside are clipped.
        gamma: (B,) positive exponents.

    Returns:
        (B, 3, H, W) in the dtype of the images.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong.
    """
    check_images(images)
    check_rows("gamma", gamma, len(images))
    pixels = at_least_float32(images)
    # The slope of a root is infinite at 0.
    return pixels.clamp(1e-8, 1.0).pow(per_image(gamma.to(pixels.dtype))).to(images.dtype)
