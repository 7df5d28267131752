"""Random crops of a batch, every image with its own box: resized crops and crops after zero padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ttalight.errors import InputError, InputTypeError
from ttalight.transforms.checks import check_images, check_rows, positive_range, whole_number
from ttalight.transforms.draws import at_least_float32, draw_uniform
from ttalight.transforms.resampling import weighted_sums

_CANDIDATES = 10


def draw_boxes(
    count: int,
    height: int,
    width: int,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one box an image as torchvision's ``RandomResizedCrop`` does.

    The area is uniform in ``scale`` times the image's, the aspect ratio log-uniform, the place uniform. torchvision
    tries ten times and then takes the largest central crop within the ratio bounds; here ten candidates an image are
    drawn at once and the first that fits is taken, with the same fallback, so the distribution is the same.

    Args:
        count: Number of boxes.
        height: Height of the images.
        width: Width of the images.
        scale: Least and greatest share of the area.
        ratio: Least and greatest width / height.
        generator: Source of the draws; None uses the device's default generator.
        device: Where the boxes are wanted.

    Returns:
        (count, 4) int64: top, left, height, width.

    Raises:
        ValueError: If a range is not 0 < low <= high, or ``scale`` exceeds 1.
    """
    scale, ratio = positive_range("scale", scale, upper=1.0), positive_range("ratio", ratio)
    draws = draw_uniform(count, 2 * _CANDIDATES + 2, generator, device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :_CANDIDATES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * draws[:, _CANDIDATES : 2 * _CANDIDATES])
    widths = torch.sqrt(area * aspect).round()
    heights = torch.sqrt(area / aspect).round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = fits.gather(1, first)[:, 0]

    central_height, central_width = _central_crop(height, width, ratio)
    box_height = torch.where(found, heights.gather(1, first)[:, 0], central_height)
    box_width = torch.where(found, widths.gather(1, first)[:, 0], central_width)
    # A float32 draw just below one, times a large count, can round up to the count itself.
    top = torch.minimum((draws[:, -2] * (height - box_height + 1)).floor(), height - box_height)
    left = torch.minimum((draws[:, -1] * (width - box_width + 1)).floor(), width - box_width)
    top = torch.where(found, top, (height - central_height) // 2)
    left = torch.where(found, left, (width - central_width) // 2)
    return torch.stack((top, left, box_height, box_width), dim=1).long()


def _central_crop(height: int, width: int, ratio: Sequence[float]) -> tuple[int, int]:
    """Largest (height, width) whose aspect ratio lies within the bounds."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def resized_crop(images: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Cut one box out of every image and resize it to ``size`` x ``size``.

    Bilinear with antialiasing: equal to ``torchvision.transforms.v2.functional.resized_crop`` with the same boxes.
    Pixels outside the box never contribute. Mirroring costs nothing, since it only reverses the order of the taps.

    Args:
        images: (B, 3, H, W) float.
        boxes: (N, 4) integers top, left, height, width inside the image, N a multiple of B; box n belongs to image
            n % B, so several views of a batch are cut in one pass. Their values are not checked.
        size: Side of the output in pixels.
        flip: (N,) bool, which crops are mirrored left to right; None mirrors none.

    Returns:
        (N, 3, size, size) in the dtype of the images.

    Raises:
        TypeError: If the images are not floating point or the boxes not integers.
        ValueError: If a shape is wrong.
    """
    check_images(images)
    if boxes.is_floating_point():
        raise InputTypeError(f"boxes must be whole pixels; got {boxes.dtype}: round them and use boxes.long()")
    size = whole_number("size", size, 1)
    batch, _, height, width = images.shape
    count = boxes.shape[0]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or (count % batch if batch else count):
        raise InputError(
            f"boxes must be (N, 4) with N a multiple of the {batch} images: top, left, height, width; "
            f"got shape {tuple(boxes.shape)}"
        )
    pixels = at_least_float32(images)
    target = torch.arange(size, device=images.device).expand(count, size)
    across = target
    if flip is not None:
        check_rows("flip", flip, count)
        across = torch.where(flip[:, None], size - 1 - target, target)
    top, left, box_height, box_width = boxes.unbind(1)
    rows = _bilinear_taps(target, top, box_height, size, height, pixels.dtype)
    columns = _bilinear_taps(across, left, box_width, size, width, pixels.dtype)
    return weighted_sums(pixels, rows, columns).to(images.dtype)


def _bilinear_taps(
    target: Tensor, start: Tensor, length: Tensor, size: int, extent: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the pixels, and their weights, of output pixel ``target`` of a segment resized to ``size``.

    Args:
        target: (N, S) output positions in [0, size).
        start: (N,) first pixel of the segment.
        length: (N,) pixels in the segment.
        size: Length of the output.
        extent: Length of the image's side, the bound of ``length``.
        dtype: dtype of the weights.

    Returns:
        Index (N, S, K) and weight (N, S, K), K the most pixels that any segment can need.
    """
    taps = math.ceil(2 * max(1.0, extent / size))
    scale = (length.to(dtype) / size)[:, None]
    support = scale.clamp(min=1.0)
    center = scale * (target + 0.5)
    first = (center - support + 0.5).floor().clamp(min=0.0)
    pixel = first[..., None] + torch.arange(taps, device=target.device)
    distance = (pixel - center[..., None] + 0.5) * (1.0 / support)[..., None]
    weight = (1.0 - distance.abs()).clamp(min=0.0)
    last = (length - 1)[:, None, None]
    weight = weight * (pixel <= last)
    index = start[:, None, None] + torch.minimum(pixel.long(), last)
    return index, weight / weight.sum(dim=2, keepdim=True)


def draw_offsets(
    count: int, padding: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw where a crop of the original size starts in a padded image.

    Args:
        count: Number of images.
        padding: Pixels added on every side.
        generator: Source of the draws; None uses the device's default generator.
        device: Where the offsets are wanted.

    Returns:
        (count, 2) int64: top and left, each uniform in 0 .. 2 * padding.
    """
    return (draw_uniform(count, 2, generator, device) * (2 * padding + 1)).long()


def padded_crop(images: Tensor, offsets: Tensor, padding: int, flip: Tensor | None = None) -> Tensor:
    """Pad with zeros on every side and cut the original size out again, every image at its own offset.

    Args:
        images: (B, 3, H, W) float.
        offsets: (B, 2) int64 top and left in 0 .. 2 * padding; ``padding`` itself gives the image back.
        padding: Pixels added on every side.
        flip: (B,) bool, which crops are mirrored left to right; None mirrors none.

    Returns:
        (B, 3, H, W) in the dtype of the images, every value copied.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape is wrong.
    """
    check_images(images)
    batch, channels, height, width = images.shape
    check_rows("offsets", offsets, batch, (2,))
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if flip is not None:
        check_rows("flip", flip, batch)
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    pixel = rows[:, :, None] * (width + 2 * padding) + (columns + offsets[:, 1:])[:, None]
    padded = functional.pad(images, (padding, padding, padding, padding)).flatten(2)
    return padded.gather(2, pixel.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image at random by up to ``padding`` pixels, zeros moving in (CIFAR's standard crop has 4).

    Args:
        images: (B, 3, H, W) float.
        padding: Pixels added on every side before the crop.
        generator: Source of the draws; None uses the device's default generator.

    Returns:
        (B, 3, H, W).

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If their shape or the padding is wrong.
    """
    check_images(images)
    padding = whole_number("padding", padding, 0)
    return padded_crop(images, draw_offsets(len(images), padding, generator, images.device), padding)
