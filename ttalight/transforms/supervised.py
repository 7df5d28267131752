"""The two standard augmentations of supervised training on small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttalight.transforms.checks import check_images, positive_range, probability, whole_number
from ttalight.transforms.crop import draw_boxes, draw_offsets, padded_crop, resized_crop
from ttalight.transforms.draws import draw_mask


class ResizedCropFlip(nn.Module):
    """Draws resized crops and horizontal flips; base class.

    Args:
        size: Side of the output in pixels; None keeps the shorter side of the input.
        scale: Least and greatest share of the image's area, within (0, 1]; TTT++ trains on CIFAR with (0.2, 1).
        ratio: Least and greatest width / height of the crop.
        flip: Chance of mirroring left to right.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        size: int | None = None,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> None:
        super().__init__()
        self.size = None if size is None else whole_number("size", size, 1)
        self.scale = positive_range("scale", scale, upper=1.0)
        self.ratio = positive_range("ratio", ratio)
        self.flip = probability("flip", flip)

    def draw(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int, Tensor | None]:
        """Return boxes (B, 4), the side of the output, and which crops are mirrored, (B,), None for none."""
        check_images(images)
        count, _, height, width = images.shape
        boxes = draw_boxes(count, height, width, self.scale, self.ratio, generator, images.device)
        flips = draw_mask(count, self.flip, generator, images.device) if self.flip else None
        return boxes, self.size or min(height, width), flips

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"size={self.size}, scale={self.scale}, ratio={self.ratio}, flip={self.flip}"


class RandomResizedCropFlip(ResizedCropFlip):
    """Random resized crop and horizontal flip, drawn for every image by itself.

    Szegedy et al.: Going Deeper with Convolutions, CVPR 2015, arXiv:1409.4842, in torchvision's form. For arguments see
    ``ResizedCropFlip``.
    """

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1].
            generator: Source of all draws; None uses the default generator of the images' device.

        Returns:
            (B, 3, S, S) in the dtype of the images.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their shape is wrong.
        """
        return resized_crop(images, *self.draw(images, generator))


class RandomCropFlip(nn.Module):
    """Random crop after zero padding and horizontal flip, CIFAR's standard augmentation, drawn for every image.

    Lee, Xie, Gallagher, Zhang, Tu: Deeply-Supervised Nets, AISTATS 2015, arXiv:1409.5185.

    Args:
        padding: Zero pixels added on every side before the crop of the original size.
        flip: Chance of mirroring left to right.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, padding: int = 4, flip: float = 0.5) -> None:
        super().__init__()
        self.padding = whole_number("padding", padding, 0)
        self.flip = probability("flip", flip)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1].
            generator: Source of all draws; None uses the default generator of the images' device.

        Returns:
            (B, 3, H, W) in the dtype of the images.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their shape is wrong.
        """
        check_images(images)
        offsets = draw_offsets(len(images), self.padding, generator, images.device)
        flips = draw_mask(len(images), self.flip, generator, images.device) if self.flip else None
        return padded_crop(images, offsets, self.padding, flips)

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"padding={self.padding}, flip={self.flip}"
