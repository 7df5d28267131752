"""SimCLR's random views of a batch, all images and all views in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttalight.transforms.blur import blur_kernel_size, draw_sigmas, gaussian_blur
from ttalight.transforms.checks import check_images, positive_range, probability, whole_number
from ttalight.transforms.color import JitterParameters, check_jitter, color_jitter, draw_color_jitter, grayscale
from ttalight.transforms.crop import draw_boxes, resized_crop
from ttalight.transforms.draws import at_least_float32, draw_mask

_CACHED_VALUES = 1 << 19


class ViewParameters(NamedTuple):
    """Operations of `SimCLRViews` on each of N views. A step that is None is left out.

    Attributes:
        boxes: (N, 4) int64 top, left, height, width of the crops.
        flip: (N,) bool, which crops are mirrored.
        jitter: Parameters of the colour jitter.
        grey: (N,) bool, which views lose their colour.
        sigmas: (N,) standard deviations of the blur in pixels.
        blurred: (N,) bool, which views are blurred.
    """

    boxes: Tensor
    flip: Tensor | None = None
    jitter: JitterParameters | None = None
    grey: Tensor | None = None
    sigmas: Tensor | None = None
    blurred: Tensor | None = None


class SimCLRViews(nn.Module):
    """Random views for contrastive learning: resized crop, flip, colour jitter, greyscale and blur.

    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020,
    arXiv:2002.05709. The defaults are those for CIFAR of Liu, Kothari, van Delft, Bellot-Gurlet, Mordan, Alahi: TTT++:
    When Does Self-Supervised Test-Time Training Fail or Thrive?, NeurIPS 2021: crops of 20 to 100 % of the area, jitter
    (0.4, 0.4, 0.4, 0.1) on 80 % of the views, 20 % grey, no blur. For sets of 224 pixels ``blur: 0.5`` is usual. The
    authors' code works on one 8-bit image at a time; here nothing is rounded to 8 bits in between.

    Everything that is drawn is drawn for each view by itself, the order of the four jitter operations included. The
    device is never waited for, no shape depends on a value and matrix products are not used, so the module can be
    compiled or captured and gives the same under autocast. ``torch.compile`` does not trace generators: with one, call
    `draw` outside and compile `render`. A step whose chance is 0 costs nothing.

    Args:
        size: Side of the views in pixels; None keeps the shorter side of the input.
        scale: Least and greatest share of the image's area in a crop, within (0, 1].
        ratio: Least and greatest width / height of a crop.
        flip: Chance of mirroring left to right.
        jitter: Strengths of brightness, contrast, saturation and hue.
        jitter_probability: Chance of jittering the colours.
        grayscale: Chance of dropping the colours.
        blur: Chance of a Gaussian blur, whose kernel is about a tenth of ``size`` wide.
        blur_sigma: Least and greatest standard deviation of the blur in pixels.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        size: int | None = None,
        scale: Sequence[float] = (0.2, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_probability: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 0.0,
        blur_sigma: Sequence[float] = (0.1, 2.0),
    ) -> None:
        super().__init__()
        self.size = None if size is None else whole_number("size", size, 1)
        self.scale = positive_range("scale", scale, upper=1.0)
        self.ratio = positive_range("ratio", ratio)
        self.flip = probability("flip", flip)
        self.jitter = check_jitter(jitter)
        self.jitter_probability = probability("jitter_probability", jitter_probability)
        self.grayscale = probability("grayscale", grayscale)
        self.blur = probability("blur", blur)
        self.blur_sigma = positive_range("blur_sigma", blur_sigma)

    def forward(self, images: Tensor, generator: torch.Generator | None = None, views: int = 2) -> Tensor:
        """Make ``views`` random views of every image.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1].
            generator: Source of all draws; None uses the default generator of the images' device.
            views: Number of views an image.

        Returns:
            (views * B, 3, S, S) in the dtype of the images: rows 0 .. B-1 are the first view, B .. 2B-1 the second.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their shape or ``views`` is wrong.
        """
        check_images(images)
        count = whole_number("views", views, 1) * len(images)
        height, width = images.shape[2:]
        return self.render(images, self.draw(count, height, width, generator, images.device))

    def draw(
        self,
        count: int,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> ViewParameters:
        """Draw what happens to ``count`` views of images of the given size.

        Args:
            count: Number of views, all images together.
            height: Height of the images.
            width: Width of the images.
            generator: Source of all draws; None uses the device's default generator.
            device: Where the parameters are wanted.

        Returns:
            Parameters for `render`.
        """
        boxes = draw_boxes(count, height, width, self.scale, self.ratio, generator, device)
        flip = draw_mask(count, self.flip, generator, device) if self.flip else None
        jitter = None
        if self.jitter_probability and any(self.jitter):
            jitter = draw_color_jitter(count, self.jitter, self.jitter_probability, generator, device)
        grey = draw_mask(count, self.grayscale, generator, device) if self.grayscale else None
        if not self.blur:
            return ViewParameters(boxes, flip, jitter, grey)
        sigmas = draw_sigmas(count, self.blur_sigma, generator, device)
        return ViewParameters(boxes, flip, jitter, grey, sigmas, draw_mask(count, self.blur, generator, device))

    def render(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """Make the views that the parameters describe.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1].
            parameters: N rows, N a multiple of B; row n is a view of image n % B.

        Returns:
            (N, 3, S, S) in the dtype of the images.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If a shape is wrong.
        """
        check_images(images)
        size = self.size or min(images.shape[2:])
        batch, count = len(images), len(parameters.boxes)
        if images.device.type != "cpu" or torch.compiler.is_compiling() or not batch or count % batch:
            return _render(images, parameters, size)
        # On a CPU a part of the batch at a time, so that the intermediate results stay in its cache.
        views = count // batch
        rows = max(8, _CACHED_VALUES // (3 * views * size * size))
        if rows >= batch:
            return _render(images, parameters, size)
        parts = [
            _render(images[start : start + rows], _of_images(parameters, slice(start, start + rows), views), size)
            for start in range(0, batch, rows)
        ]
        return torch.cat([part.view(views, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return (
            f"size={self.size}, scale={self.scale}, ratio={self.ratio}, flip={self.flip}, jitter={self.jitter}, "
            f"jitter_probability={self.jitter_probability}, grayscale={self.grayscale}, blur={self.blur}"
        )


def _render(images: Tensor, parameters: ViewParameters, size: int) -> Tensor:
    """Every step on all rows at once."""
    made = resized_crop(at_least_float32(images), parameters.boxes, size, parameters.flip)
    if parameters.jitter is not None:
        made = color_jitter(made, parameters.jitter)
    if parameters.grey is not None:
        made = grayscale(made, parameters.grey)
    if parameters.sigmas is not None:
        made = gaussian_blur(made, parameters.sigmas, blur_kernel_size(size), parameters.blurred)
    return made.to(images.dtype)


def _of_images(parameters: ViewParameters, images: slice, views: int) -> ViewParameters:
    """Parameters of all views of some of the images."""

    def part(values: Tensor) -> Tensor:
        return values.view(views, -1, *values.shape[1:])[:, images].flatten(0, 1)

    def optional(values: Tensor | None) -> Tensor | None:
        return None if values is None else part(values)

    boxes, flip, jitter, grey, sigmas, blurred = parameters
    if jitter is not None:
        brightness, contrast, saturation, hue, order, applied = jitter
        jitter = JitterParameters(
            optional(brightness),
            optional(contrast),
            optional(saturation),
            optional(hue),
            part(order),
            optional(applied),
        )
    return ViewParameters(part(boxes), optional(flip), jitter, optional(grey), optional(sigmas), optional(blurred))
