"""Tiny ImageNet and Tiny-ImageNet-C."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttalight.data.arrays import ImageArrays
from ttalight.data.class_folders import class_files, class_names, corruption_folder
from ttalight.data.download import DATA_VARIABLE
from ttalight.data.image_files import FileDomain, ImageFiles
from ttalight.data.image_folder import ImageFolderDataModule
from ttalight.data.module import Split
from ttalight.data.splits import held_out, spread_order
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError

__all__ = ["TinyImageNetDataModule"]

_FOLDER = "tiny-imagenet-200"
_CORRUPTED = "Tiny-ImageNet-C"
_SOURCES = {
    _FOLDER: "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    _CORRUPTED: "https://zenodo.org/records/2536630",
}


class TinyImageNetDataModule(ImageFolderDataModule):
    """100,000 training and 10,000 test images of 64 x 64 pixels in 200 classes, and their corrupted copies.

    Reads what the archives unpack to: ROOT/tiny-imagenet-200 with train/<wnid>/images/*.JPEG, val/images/*.JPEG and
    val/val_annotations.txt (or val sorted into one folder a class), and ROOT/Tiny-ImageNet-C with
    <corruption>/<severity>/<wnid>/*.JPEG. Classes stand in the order of their WordNet ids. The labelled "val" images
    are tested on; those of the archive's test folder have no labels. Validation images are taken from the training
    images: the last ``validation`` of a fixed order that spreads the classes evenly.

    The 200 classes are classes of ImageNet and the images are ImageNet's: a network that was trained on ImageNet has
    seen the test set's relatives with their labels.

    Sources: Y. Le and X. Yang, *Tiny ImageNet Visual Recognition Challenge*, CS 231N, 2015; D. Hendrycks and
    T. Dietterich, ICLR 2019, arXiv 1903.12261 (-C).

    Args:
        root: Folder with the sets; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        generate: Make corruptions in memory from the clean images instead of reading Tiny-ImageNet-C.
        validation: Number of training images kept for validation. With 0 all of them are trained on and nothing is
            validated.
        kwargs: See ``ImageFolderDataModule`` and ``ImageDataModule``.

    Raises:
        ValueError: If an argument is out of range or, once data are read, an image or the annotations cannot be read.
        FileNotFoundError: Once data are read, if a folder is missing.
    """

    num_classes = 200
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.277, 0.2691, 0.2821)

    def __init__(
        self,
        root: str | None = None,
        generate: bool = False,
        validation: int = 5000,
        resize: int | None = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, resize=resize, **kwargs)
        if validation < 0:
            raise InputError(f"validation must be at least 0, got {validation}")
        self.generate = generate
        self.validation = validation

    def _find(self, split: Split) -> Path | None:
        return None if split == "validation" and self.validation == 0 else self._tree(_FOLDER)

    def _tree(self, name: str) -> Path:
        if (self.root / name).is_dir():
            return self.root / name
        ways = ", or make the corruptions by generate: true (--data.generate true)" if name == _CORRUPTED else ""
        raise MissingFileError(
            f"no {name} folder in {self.root} ({DATA_VARIABLE} is {os.environ.get(DATA_VARIABLE) or 'not set'}): "
            f"unpack {_SOURCES[name]} there{ways}. If it is elsewhere, name the folder that has it in it by root "
            f"(--data.root) or by the environment variable {DATA_VARIABLE}"
        )

    def open(self, split: Split) -> ImageFiles:
        """Return the clean images of a split, decoded when they are read."""
        tree = self._tree(_FOLDER)
        classes = {wnid: number for number, wnid in enumerate(class_names(tree / "train"))}
        self.num_classes = len(classes)
        if split == "test":
            return self._annotated(tree / "val", classes)
        whole = class_files(tree / "train", classes, self.resize, interpolation=self.interpolation)
        return whole.part(held_out(whole.labels, self.validation, split))

    def _annotated(self, folder: Path, classes: dict[str, int]) -> ImageFiles:
        table = folder / "val_annotations.txt"
        if not table.is_file():
            return class_files(folder, classes, self.resize, interpolation=self.interpolation)
        rows = _rows(table)
        odd = next((row for row in rows if not _is_row(row, classes)), None)
        if odd is not None or not rows:
            raise InputError(
                f"{table} must have lines of a file name, a tab and one of the {len(classes)} classes, got {odd}: "
                "unpack the archive again"
            )
        labels = np.array([classes[wnid] for _, wnid in rows], dtype=np.int64)
        order = spread_order(labels)
        return self._files(folder / "images", [rows[index][0] for index in order], torch.from_numpy(labels[order]))

    def _files(self, folder: Path, files: list[str], labels: torch.Tensor) -> ImageFiles:
        return ImageFiles(folder, files, labels, self.resize, interpolation=self.interpolation)

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order."""
        wanted = self.stream_domains()
        if self.generate or not any(severity for _, severity in wanted):
            return super().load_domains()
        if self.stream_split != "test":
            raise InputError(
                f"{_CORRUPTED} was made from the test images, and stream_split is {self.stream_split}: use generate: "
                f"true (--data.generate true) to make the corruptions from the {self.stream_split} images"
            )
        read = {key: self._read_domain(*key) for key in dict.fromkeys(wanted)}
        return [read[key] for key in wanted]

    def _read_domain(self, name: str, severity: int) -> tuple[Domain, ImageArrays]:
        if name == "clean":
            return Domain(name), FileDomain(self.open("test"), self.limit)
        folder = corruption_folder(self._tree(_CORRUPTED), name, severity)
        classes = {wnid: number for number, wnid in enumerate(class_names(self._tree(_FOLDER) / "train"))}
        files = class_files(folder, classes, self.resize, interpolation=self.interpolation)
        return Domain(name, severity), FileDomain(files, self.limit)


def _rows(table: Path) -> list[list[str]]:
    try:
        return [line.split("\t")[:2] for line in table.read_text(encoding="utf-8").splitlines() if line]
    except UnicodeDecodeError as error:
        raise InputError(f"{table} is not a table in UTF-8 ({error}): unpack the archive again") from error


def _is_row(row: list[str], classes: dict[str, int]) -> bool:
    """Return whether a row has the name of a file in the folder of images, and a class."""
    return len(row) == 2 and row[1] in classes and Path(row[0]).name == row[0] and "\0" not in row[0]
