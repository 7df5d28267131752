"""Labelled image files, decoded when a batch is read."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from ttalight.data.arrays import ImageArrays
from ttalight.data.pictures import read_picture
from ttalight.errors import InputError

__all__ = ["FileDomain", "ImageFiles", "Interpolation", "as_is", "read_image"]

#: Pillow's filters, by the names that timm has for them.
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

#: Pixels that a scaled picture may have; Pillow refuses larger files.
_MOST_PIXELS = 179_000_000


class ImageFiles(Dataset[tuple[Tensor, ...]]):
    """A labelled image set on disk; every image becomes its square centre at one size.

    Args:
        folder: Folder that the files are in.
        files: Paths within that folder.
        labels: int64, (N,).
        size: Side of the images in pixels; see `read_image`.
        with_index: Whether a batch carries the samples' indices as a third field.
        scale: Side that the shorter side of an image is scaled to; ``size`` by default.
        interpolation: Filter of that scaling.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        labels: Tensor,
        size: int,
        with_index: bool = False,
        scale: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.folder = folder
        # Worker processes that read a list of strings copy it page by page; an array stays shared.
        self.files = np.array([os.fsencode(file) for file in files])
        self.labels = labels
        self.size = size
        self.with_index = with_index
        self.scale = size if scale is None else scale
        self.interpolation: Interpolation = interpolation

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / os.fsdecode(bytes(self.files[index]))

    def part(self, indices: npt.NDArray[np.int64]) -> ImageFiles:
        """Return some of the images, in the order of ``indices``."""
        chosen = copy.copy(self)
        chosen.files, chosen.labels = self.files[indices], self.labels[torch.from_numpy(indices)]
        return chosen

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(field[0] for field in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[Any]) -> tuple[Tensor, ...]:
        """Return the batch of the given samples: images, uint8 (B, 3, size, size), and labels (B,)."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = torch.stack(
            [read_image(self.path(i), self.size, self.scale, self.interpolation) for i in index.tolist()]
        )
        return (images, self.labels[index], index) if self.with_index else (images, self.labels[index])

    def decode(self, count: int, num_workers: int) -> ImageArrays:
        """Read the first images into memory.

        Args:
            count: How many; all if there are fewer.
            num_workers: Processes that decode; 0 decodes in this one.
        """
        count = min(count, len(self))
        images = torch.empty((count, 3, self.size, self.size), dtype=torch.uint8)
        loader = DataLoader(self, 32, sampler=range(count), collate_fn=as_is, num_workers=num_workers)
        done = 0
        for batch, *_ in tqdm(loader, desc=f"Reading {self.folder}", unit="batch", disable=None, leave=False):
            images[done : done + len(batch)] = batch
            done += len(batch)
        return ImageArrays(images, self.labels[:count])


class FileDomain(ImageArrays):
    """A domain of the stream whose images are decoded when a batch is read, and not kept.

    Args:
        files: The images.
        limit: Use the first so many only.
    """

    def __init__(self, files: ImageFiles, limit: int | None = None) -> None:
        count = len(files) if limit is None else min(limit, len(files))
        shape_only = torch.zeros(1, dtype=torch.uint8).expand(count, 3, files.size, files.size)
        super().__init__(shape_only, files.labels[:count])
        self.files = files

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[Any]) -> tuple[Tensor, ...]:
        return self.files.__getitems__(indices)[:2]


def read_image(path: Path, size: int, scale: int | None = None, interpolation: Interpolation = "bilinear") -> Tensor:
    """Read an image file: shorter side to ``scale`` pixels, then the square centre.

    Sizes, rounding and filter (with antialiasing, on 8 bits) are those of torchvision's ``Resize`` and ``CenterCrop``
    on Pillow images.

    Args:
        path: JPEG, PNG, PPM, BMP, TIFF or WebP; see `read_picture` for more than 8 bits.
        size: Side of the centre in pixels, at most ``scale``.
        scale: What the shorter side is scaled to, in pixels; ``size`` by default.
        interpolation: Filter of the scaling.

    Returns:
        uint8 RGB, (3, size, size).

    Raises:
        ValueError: If the file cannot be read, or is too narrow to be scaled; the message names it.
    """
    image = read_picture(path)
    width, height = image.size
    short = min(width, height)
    scale = size if scale is None else scale
    width, height = int(scale * width / short), int(scale * height / short)
    if width * height > _MOST_PIXELS:  # a line of pixels, which scaling would make large
        raise InputError(
            f"cannot read image {path}: of {image.width} x {image.height} pixels, it would have {width} x {height} "
            "when it is scaled; replace or remove the file"
        )
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def as_is(batch: Any) -> Any:
    """Collate a batch that was read as one."""
    return batch
