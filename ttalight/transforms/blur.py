"""Gaussian blur of a batch, every image with its own width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.transforms.checks import check_images, check_rows, positive_range
from ttalight.transforms.draws import at_least_float32, draw_uniform, select
from ttalight.transforms.resampling import weighted_sums


def blur_kernel_size(size: int) -> int:
    """Odd kernel size of about a tenth of the image's side: 23 at 224 pixels, 7 at 64, never less than 3."""
    return max(3, 2 * (size // 20) + 1)


def draw_sigmas(
    count: int,
    sigma: Sequence[float] = (0.1, 2.0),
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one standard deviation an image, uniform in the range.

    Args:
        count: Number of images.
        sigma: Least and greatest standard deviation in pixels.
        generator: Source of the draws; None uses the device's default generator.
        device: Where the standard deviations are wanted.

    Returns:
        (count,) float32.

    Raises:
        ValueError: If the range is not 0 < low <= high.
    """
    low, high = positive_range("sigma", sigma)
    return low + (high - low) * draw_uniform(count, 1, generator, device)[:, 0]


def gaussian_blur(images: Tensor, sigmas: Tensor, kernel_size: int, applied: Tensor | None = None) -> Tensor:
    """Blur every image with its own Gaussian, reflecting at the borders without repeating the border pixel.

    Equal to ``torchvision.transforms.v2.functional.gaussian_blur`` image by image.

    Args:
        images: (B, 3, H, W) float.
        sigmas: (B,) standard deviations in pixels, positive; their values are not checked.
        kernel_size: Odd number of taps in each direction, at most 2 * min(H, W) - 1.
        applied: (B,) bool, which images are blurred; None blurs all.

    Returns:
        (B, 3, H, W) in the dtype of the images.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If a shape or the kernel size is wrong.
    """
    check_images(images)
    batch, _, height, width = images.shape
    check_rows("sigmas", sigmas, batch)
    if kernel_size % 2 == 0 or not 0 < kernel_size < 2 * min(height, width):
        raise InputError(
            f"kernel_size must be odd, positive and less than twice the shorter side of {height} x {width} images; "
            f"got {kernel_size}"
        )
    pixels = at_least_float32(images)
    steps = torch.arange(kernel_size, device=images.device) - kernel_size // 2
    exponent = (steps.to(pixels.dtype) / sigmas.to(pixels.dtype)[:, None]).square() * -0.5
    kernel = exponent.softmax(dim=1)[:, None]
    rows = _reflected(steps, height).expand(batch, -1, -1), kernel.expand(-1, height, -1)
    columns = _reflected(steps, width).expand(batch, -1, -1), kernel.expand(-1, width, -1)
    blurred = weighted_sums(pixels, rows, columns)
    if applied is not None:
        check_rows("applied", applied, batch)
        blurred = select(applied, blurred, pixels)
    return blurred.to(images.dtype)


def _reflected(steps: Tensor, extent: int) -> Tensor:
    """Neighbours of every position at the given steps, folded back into [0, extent): (extent, K)."""
    neighbour = (torch.arange(extent, device=steps.device)[:, None] + steps).abs()
    return (extent - 1) - (extent - 1 - neighbour).abs()
