"""Random images as a data set."""

from __future__ import annotations

from typing import Any

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import torch

from ttalight.data import ImageArrays, ImageDataModule


class RandomImages(ImageDataModule):
    """Random images of 32 pixels a side.

    Args:
        images: Number of images in a domain.
        kwargs: See ``ImageDataModule``.
    """

    num_classes = 10
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, images: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.images = images

    def load(self, split: str) -> ImageArrays:
        """Return the images."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (self.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ImageArrays(pixels, torch.randint(10, (self.images,), generator=generator))
