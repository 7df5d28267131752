"""Scanned digits that travel inside the package: real data for a first run, without a download."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch.nn.functional import interpolate

from ttalight.data.arrays import ImageArrays
from ttalight.data.module import ImageDataModule, Split

__all__ = ["DigitsDataModule"]

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")  # as the numbers in the file


class DigitsDataModule(ImageDataModule):
    """1,797 scans of handwritten digits, 8 x 8 pixels, shown at 32 x 32.

    The split is fixed and stratified: 1,000 images for training, 297 for validation, 500 for test. Grey levels
    become RGB with equal channels; pixels are interpolated bilinearly.

    Source: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository,
    1998 (CC BY 4.0), in the copy that scikit-learn distributes.
    """

    num_classes = 10
    mean = (0.305, 0.305, 0.305)
    std = (0.324, 0.324, 0.324)

    def load(self, split: Split) -> ImageArrays:
        """Return the clean images of a split."""
        with (
            files("ttalight.data").joinpath("digits.npz").open("rb") as file,
            np.load(file, allow_pickle=False) as data,
        ):
            chosen = data["split"] == _SPLITS.index(split)
            images, labels = data["images"][chosen], data["labels"][chosen].astype(np.int64)
        grey = torch.from_numpy(images).float().mul_(255 / 16).unsqueeze(1)
        upsampled = interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
        rgb = upsampled.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        return ImageArrays(rgb, torch.from_numpy(labels))
