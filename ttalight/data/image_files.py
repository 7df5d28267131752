"""Labelled image files, decoded when a batch is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from ttalight.data.arrays import ImageArrays

__all__ = ["ImageFiles", "as_is", "read_image"]


class ImageFiles(Dataset[tuple[Tensor, ...]]):
    """A labelled image set on disk; every image becomes its square centre at one size.

    Args:
        folder: Folder that the files are in.
        files: Paths within that folder.
        labels: int64, (N,).
        size: Side of the images in pixels; see `read_image`.
        with_index: Whether a batch carries the samples' indices as a third field.
    """

    def __init__(self, folder: Path, files: Sequence[str], labels: Tensor, size: int, with_index: bool = False) -> None:
        self.folder = folder
        # Worker processes that read a list of strings copy it page by page; an array stays shared.
        self.files = np.array([os.fsencode(file) for file in files])
        self.labels = labels
        self.size = size
        self.with_index = with_index

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / os.fsdecode(bytes(self.files[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(field[0] for field in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[Any]) -> tuple[Tensor, ...]:
        """Return the batch of the given samples: images, uint8 (B, 3, size, size), and labels (B,)."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = torch.stack([read_image(self.path(i), self.size) for i in index.tolist()])
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


def read_image(path: Path, size: int) -> Tensor:
    """Read an image file: shorter side to ``size`` pixels, then the square centre.

    Sizes, rounding and filter (bilinear with antialiasing, on 8 bits) are those of torchvision's ``Resize`` and
    ``CenterCrop`` on Pillow images.

    Args:
        path: Any format that Pillow reads.
        size: Side in pixels.

    Returns:
        uint8 RGB, (3, size, size).

    Raises:
        ValueError: If the file cannot be read; the message names it.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read image {path} ({type(error).__name__}: {error}): replace the file or take it away"
        ) from error
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def as_is(batch: Any) -> Any:
    """Collate a batch that was read as one."""
    return batch
