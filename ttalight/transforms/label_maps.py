"""Random crops and flips of images together with their label maps."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.transforms.crop import resized_crop
from ttalight.transforms.supervised import ResizedCropFlip

__all__ = ["RandomResizedCropFlipMaps", "resized_crop_maps"]


def resized_crop_maps(labels: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Cut one box out of every label map and resize it to ``size`` x ``size``; every value is copied.

    The pixel that is copied is the one in which the centre of the output pixel lies, so that maps fit images that
    ``resized_crop`` has cut with the same boxes.

    Args:
        labels: (B, H, W), integers.
        boxes: (B, 4) integers top, left, height, width inside the map. Their values are not checked.
        size: Side of the output in pixels.
        flip: (B,) bool, which crops are mirrored left to right; None mirrors none.

    Returns:
        (B, size, size) in the dtype of the labels.

    Raises:
        ValueError: If a shape is wrong.
    """
    if labels.ndim != 3 or boxes.shape != (len(labels), 4):
        raise InputError(
            f"label maps must be (B, H, W) and boxes (B, 4), got {tuple(labels.shape)} and {tuple(boxes.shape)}"
        )
    top, left, height, width = boxes[..., None].unbind(1)
    target = torch.arange(size, device=labels.device)[None]
    across = target.expand(len(labels), -1)
    if flip is not None:
        across = torch.where(flip[:, None], size - 1 - across, across)
    # The centre (t + 1/2) / size of the box, in whole pixels, without rounding errors.
    rows = top + (2 * target + 1) * height // (2 * size)
    columns = left + (2 * across + 1) * width // (2 * size)
    image = torch.arange(len(labels), device=labels.device)[:, None, None]
    return labels[image, rows[:, :, None], columns[:, None, :]]


class RandomResizedCropFlipMaps(ResizedCropFlip):
    """Random resized crop and horizontal flip of images and label maps, drawn for every image by itself.

    Images are scaled bilinearly, label maps keep their numbers. For arguments see ``ResizedCropFlip``.
    """

    def forward(
        self, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1].
            labels: (B, H, W), integers.
            generator: Source of all draws; None uses the default generator of the images' device.

        Returns:
            Images (B, 3, S, S) and label maps (B, S, S), in their dtypes.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If a shape is wrong.
        """
        drawn = self.draw(images, generator)
        expected = images[:, 0].shape
        if labels.shape != expected:
            raise InputError(f"label maps must be {tuple(expected)}, as the images, got {tuple(labels.shape)}")
        return resized_crop(images, *drawn), resized_crop_maps(labels, *drawn)
