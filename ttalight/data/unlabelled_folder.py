"""A folder of images without labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from ttalight.data.arrays import ImageArrays
from ttalight.data.folders import find_files, subfolders
from ttalight.data.image_files import FileDomain, ImageFiles
from ttalight.data.image_folder import ImageFolderDataModule
from ttalight.data.module import Split
from ttalight.data.streams import Domain, PerDomain, StreamOrder
from ttalight.errors import InputError, MissingFileError
from ttalight.labels import UNLABELLED

__all__ = ["UnlabelledFolderDataModule"]


class UnlabelledFolderDataModule(ImageFolderDataModule):
    """Images in ROOT, at any depth, whose classes nobody knows.

    They come in the order of the names of folders and files, as a camera numbers them, and are decoded when a batch is
    read. All labels are ``ttalight.labels.UNLABELLED`` (-100). Results have entropy, diversity of the predictions and
    their agreement with the source model, and no accuracy. Nothing can be trained on them.

    Args:
        root: Folder with the images; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        domains: Names of folders in ROOT, each of which is a domain of the stream; by default all images of ROOT are
            one.
        stream: Order in which the images arrive; ``PerDomain(shuffle=False)`` by default. Streams that order images by
            their labels cannot be used.
        kwargs: See ``ImageFolderDataModule`` and ``ImageDataModule``.

    Raises:
        ValueError: If an argument is out of range or, once data are read, an image cannot be read.
        FileNotFoundError: Once data are read, if a folder is missing or has no images.
    """

    def __init__(
        self,
        root: str | None = None,
        domains: Sequence[str] | None = None,
        stream: StreamOrder | None = None,
        **kwargs: Any,
    ) -> None:
        order = PerDomain(shuffle=False) if stream is None else stream
        super().__init__(root=root, domains=("clean",) if domains is None else domains, stream=order, **kwargs)
        self._is_one = domains is None

    def open(self, split: Split) -> ImageFiles:
        """Raise an error: there are no labels to train on or to validate with."""
        raise InputError(
            f"the images of {type(self).__name__} have no labels, so nothing can be trained or validated on them: use "
            "adapt, or ImageFolderDataModule for images in one folder a class"
        )

    def stream_domains(self) -> list[tuple[str, int]]:
        """Return the stream's domains; they have no severity.

        Raises:
            ValueError: If the stream asks for clean images beside them.
        """
        if self.order.needs_clean:
            raise InputError(
                f"{type(self.order).__name__} asks for clean images beside the domains, and a folder of unlabelled "
                "images has no such set: take another stream"
            )
        return [(name, 0) for name in self.domains]

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of the stream, in the order of ``domains``."""
        if not self.root.is_dir():
            raise MissingFileError(f"there is no folder {self.root}: name the folder with the images by root")
        wanted = self.stream_domains()
        if self._is_one:
            return [(Domain(self.root.resolve().name or "all"), self._part("."))]
        present = subfolders(self.root)
        unknown = [name for name in self.domains if name not in present]
        if unknown:
            raise MissingFileError(
                f"no folder {', '.join(unknown)} in {self.root}; there are {', '.join(present) or 'no folders'}"
            )
        return [(Domain(name), self._part(name)) for name, _ in wanted]

    def _part(self, name: str) -> FileDomain:
        files = find_files(self.root, [name], IMG_EXTENSIONS)[name]
        if not files:
            raise MissingFileError(
                f"no images in {Path(os.path.normpath(self.root / name))}: expected files that end in "
                f"{' '.join(IMG_EXTENSIONS)}, at any depth"
            )
        labels = torch.full((len(files),), UNLABELLED)
        return FileDomain(
            ImageFiles(self.root, files, labels, self.resize, interpolation=self.interpolation), self.limit
        )
