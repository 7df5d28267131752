"""Images and label maps in files, decoded when a batch is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ttalight.data.corruptions.generate import corrupt_chunk
from ttalight.data.image_files import ImageFiles
from ttalight.data.pictures import FORMATS, read_picture
from ttalight.errors import InputError
from ttalight.labels import UNLABELLED

__all__ = ["Corruption", "SegmentationFiles", "read_label_map"]


class Corruption(NamedTuple):
    """A corruption that is applied when an image is read; each image has draws of its own, by its place in the files.

    Args:
        name: Name of the corruption.
        severity: 1 to 5.
        seed: Any integer.
        frost_dir: See ``corrupt``.
    """

    name: str
    severity: int
    seed: int = 0
    frost_dir: str | None = None

    def apply(self, image: Tensor, index: int) -> Tensor:
        """Return the corrupted image, uint8 (3, H, W); strengths are those of the benchmark for images of its size."""
        side = min(image.shape[1:])
        table = "imagenet" if side >= 128 else "tiny_imagenet" if side >= 48 else "cifar"
        corrupted = corrupt_chunk(
            image[None], self.name, self.severity, chunk=index, seed=self.seed, table=table, frost_dir=self.frost_dir
        )
        return corrupted[0]


class SegmentationFiles(ImageFiles):
    """Images with a label map each, in files; nothing is kept of what was read.

    Args:
        folder: Folder that all files are in.
        files: Paths of the images within that folder.
        maps: Paths of their label maps within that folder.
        table: Class of each grey level of a label map, uint8 (256,).
        size: Height and width that images and maps are scaled to; None leaves them as they are.
        corruption: Applied to each image after it was scaled.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        maps: Sequence[str],
        table: Tensor,
        size: tuple[int, int] | None = None,
        corruption: Corruption | None = None,
    ) -> None:
        # No class belongs to an image as a whole, so streams cannot order images by one.
        super().__init__(folder, files, torch.full((len(files),), UNLABELLED), size=1)
        self.maps = np.array(maps)
        self.table, self.shape, self.corruption = table, size, corruption

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[Any]) -> tuple[Tensor, ...]:
        """Return the batch of the given samples: images, uint8 (B, 3, H, W), and classes of pixels, uint8 (B, H, W).

        Raises:
            ValueError: If images of a batch have several sizes, or a file cannot be read.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        read = [self._read(i) for i in index.tolist()]
        sizes = {tuple(image.shape[1:]) for image, _ in read}
        if len(sizes) > 1:
            shown = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
            raise InputError(
                f"a batch has images of {shown} pixels: set size (height, width), which scales all to one, or "
                "batch_size to 1"
            )
        batch = torch.stack([image for image, _ in read]), torch.stack([labels for _, labels in read])
        return (*batch, index) if self.with_index else batch

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        picture = read_picture(self.path(index))
        place = self.folder / str(self.maps[index])
        labels = read_label_map(place)
        if picture.size != labels.size:
            raise InputError(
                f"{place} has {labels.height} x {labels.width} pixels and its image {self.path(index)} has "
                f"{picture.height} x {picture.width}: they have to be of one size"
            )
        if self.shape is not None:
            width_height = self.shape[::-1]
            picture = picture.resize(width_height, Image.Resampling.BILINEAR)
            labels = labels.resize(width_height, Image.Resampling.NEAREST)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.corruption is not None:
            image = self.corruption.apply(image, index)
        return image, self.table[torch.from_numpy(np.array(labels)).long()]


def read_label_map(path: Path) -> Image.Image:
    """Read a label map: a picture of one channel of 8 bits, whose values are numbers of classes.

    Pictures with a palette give the indices of their colours.

    Raises:
        ValueError: If the file cannot be read, or has colours instead of numbers. The message names the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.load()
            picture: Image.Image = file.copy()
    except Exception as error:  # exceptions of decoders have no common base class
        raise InputError(f"cannot read label map {path} ({type(error).__name__}: {error}): replace the file") from error
    if picture.mode not in ("L", "P", "1"):
        raise InputError(
            f"label map {path} has mode {picture.mode}, expected one channel of 8 bits with numbers of classes: "
            "convert its colours to numbers"
        )
    if picture.mode == "L":
        return picture
    # The conversion to "L" would turn indices into the brightness of their colours.
    return Image.fromarray(np.array(picture).astype(np.uint8))
