"""CIFAR-10, CIFAR-100 and CIFAR-10.1 from their published files."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.datasets import CIFAR10, CIFAR100

from ttalight.data.arrays import ImageArrays
from ttalight.data.download import DATA_VARIABLE, data_root, fetch, unpack
from ttalight.data.layout import check_images, check_labels, read_npy
from ttalight.data.module import ImageDataModule, Split
from ttalight.data.splits import held_out
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError

__all__ = ["CIFARDataModule"]

#: Name within its repository of each new test set for CIFAR-10.
_NEW_TESTS = {"cifar10.1": "cifar10.1_v6", "cifar10.1_v4": "cifar10.1_v4"}
_NEW_TESTS_SOURCE = "https://github.com/modestyachts/CIFAR-10.1 (its folder datasets)"

#: torchvision's class has names, addresses and checksums; then the number of classes, mean and std of the training
#: pixels.
_SETS: dict[str, tuple[Any, int, tuple[float, float, float], tuple[float, float, float]]] = {
    "cifar10": (CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": (CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class CIFARDataModule(ImageDataModule):
    """50,000 training and 10,000 test images of 32 x 32 pixels in 10 or 100 classes; or the new test set CIFAR-10.1.

    Reads the original "python version" files, as torchvision keeps them: ROOT/cifar-10-batches-py/data_batch_1 and so
    on. They are pickles, so each is compared with its published MD5 before it is opened. The test files alone are
    enough for evaluation. Images are held in memory as one tensor, and a batch is one read.

    Validation images are taken from the training images: the last ``validation`` of a fixed, stratified random order,
    the same for every seed. Labels of the test images are for metrics only.

    CIFAR-10.1 was collected again by the recipe of CIFAR-10; what it replaces is the test set. It is read from
    ROOT/CIFAR-10.1/cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy, and the authors' first version from those with
    v4 in their names.

    Sources: A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, technical report, 2009; B. Recht et
    al., *Do CIFAR-10 Classifiers Generalize to CIFAR-10?*, arXiv 1806.00451. Mean and std are those over all training
    pixels; the smaller stds (0.2023, 0.1994, 0.2010) that some code has are means of the images' own.

    Args:
        dataset: ``cifar10``, ``cifar100`` (its fine labels), ``cifar10.1`` (2,000 test images) or ``cifar10.1_v4``
            (2,021).
        root: Folder with the data sets; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        download: Fetch what is missing (170 MB).
        validation: Number of training images kept for validation. With 0 all of them are trained on and nothing is
            validated.
        resize: Side in pixels that the images of a batch are scaled to on the device, bicubic, after they are
            corrupted: for networks of larger images. By default images have 32 x 32 pixels.
        classes: Use only the images of these classes, which are numbered from 0 in this order, for example those that
            a vision-language model was not trained on. ``limit`` counts the images of all classes. The classifier of
            a task with more classes keeps these alone.
        kwargs: See ``ImageDataModule``.

    Raises:
        ValueError: If an argument is out of range or, once data are read, a file is not the published one.
        FileNotFoundError: Once data are read, if files are missing.
    """

    def __init__(
        self,
        dataset: Literal["cifar10", "cifar100", "cifar10.1", "cifar10.1_v4"] = "cifar10",
        root: str | None = None,
        download: bool = False,
        validation: int = 5000,
        resize: int | None = None,
        classes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if dataset not in (*_SETS, *_NEW_TESTS):
            raise InputError(f"dataset must be one of {', '.join((*_SETS, *_NEW_TESTS))}, got {dataset!r}")
        if validation < 0:
            raise InputError(f"validation must be at least 0, got {validation}")
        if resize is not None and resize < 1:
            raise InputError(f"resize must be at least 1 pixel, got {resize}")
        self.resize, self.interpolation = resize, "bicubic"
        self.dataset = dataset
        self.files, self.num_classes, self.mean, self.std = _SETS["cifar10" if dataset in _NEW_TESTS else dataset]
        #: Number of classes of the whole set.
        self.set_classes = self.num_classes
        if classes is not None:
            if len({*classes}) != len(classes) or len(classes) < 2 or not {*classes} <= {*range(self.num_classes)}:
                raise InputError(
                    f"classes must be two numbers or more from 0 to {self.num_classes - 1}, each once, got {classes!r}"
                )
            self.num_classes = len(classes)
        self.source_classes = None if classes is None else tuple(classes)
        self.root = data_root(root)
        self.download = download
        self.validation = validation
        self.has_validation = validation > 0

    def protocol(self) -> dict[str, Any]:
        """Return the size that images are scaled to and the classes, where they are given; saved with a result."""
        size = {} if self.resize is None else {"resize": self.resize, "interpolation": self.interpolation}
        return size if self.source_classes is None else size | {"classes": list(self.source_classes)}

    def open(self, split: Split) -> ImageArrays:
        """Return the clean images of a split, those of ``classes``."""
        return self.of_classes(self.load(split))

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order, with their images of ``classes``."""
        return [(domain, self.of_classes(arrays)) for domain, arrays in super().load_domains()]

    def of_classes(self, arrays: ImageArrays) -> ImageArrays:
        """Return the images of ``classes``, with their new labels."""
        if self.source_classes is None:
            return arrays
        is_class = arrays.labels[:, None] == torch.tensor(self.source_classes)
        chosen = is_class.any(1)
        return ImageArrays(arrays.images[chosen], is_class[chosen].long().argmax(1))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the images of a batch into floats in [0, 1], and scale them, on the device."""
        images, *rest = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.resize is not None:
            images = interpolate(images, size=self.resize, mode="bicubic", antialias=True).clamp_(0, 1)
        return (images, *rest)

    @property
    def clean_folder(self) -> Path:
        """Folder that the published files lie in."""
        return self.root / str(self.files.base_folder)

    def prepare_data(self) -> None:
        """Fetch the files if that was asked for and some are missing; the Trainer calls this on one process."""
        if self.download:
            self.fetch_clean()

    def fetch_clean(self) -> None:
        """Download and unpack what is missing of the clean set."""
        names = [name for name, _ in self.files.train_list + self.files.test_list]
        if all((self.clean_folder / name).is_file() for name in names):
            return
        archive = self.root / self.files.filename
        fetch(self.files.url, archive, self.files.tgz_md5)
        unpack(archive, self.root, [f"{self.files.base_folder}/{name}" for name in names])

    def load(self, split: Split) -> ImageArrays:
        """Return the clean images of a split."""
        if split == "test":
            new = _NEW_TESTS.get(self.dataset)
            return self._read(self.files.test_list) if new is None else self._read_new(new)
        whole = self._read(self.files.train_list)
        chosen = torch.from_numpy(held_out(whole.labels.numpy(), self.validation, split))
        return ImageArrays(whole.images[chosen], whole.labels[chosen])

    def _read(self, files: list[Any]) -> ImageArrays:
        missing = [name for name, _ in files if not (self.clean_folder / name).is_file()]
        if missing:
            raise MissingFileError(self._advice(missing))
        batches = [_unpickle(self.clean_folder / name, md5) for name, md5 in files]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        key = "labels" if "labels" in batches[0] else "fine_labels"
        labels = np.concatenate([np.asarray(batch[key], dtype=np.int64) for batch in batches])
        return ImageArrays(torch.from_numpy(images), torch.from_numpy(labels))

    def _read_new(self, name: str) -> ImageArrays:
        folder = self.root / "CIFAR-10.1"
        folder = folder / "datasets" if (folder / "datasets").is_dir() else folder
        paths = [folder / f"{name}_data.npy", folder / f"{name}_labels.npy"]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise MissingFileError(
                f"no {', '.join(missing)} in {folder} ({DATA_VARIABLE} is "
                f"{os.environ.get(DATA_VARIABLE) or 'not set'}): get them from {_NEW_TESTS_SOURCE}. If they are "
                "elsewhere, name the folder that has CIFAR-10.1 in it by root (--data.root) or by the environment "
                f"variable {DATA_VARIABLE}"
            )
        images, labels = map(read_npy, paths)
        check_images(images, paths[0], 1)
        check_labels(labels, paths[1], len(images), paths[0], self.set_classes)
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return ImageArrays(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))

    def _advice(self, missing: list[str]) -> str:
        return (
            f"no {', '.join(missing)} in {self.clean_folder} ({DATA_VARIABLE} is "
            f"{os.environ.get(DATA_VARIABLE) or 'not set'}). To get the set, use download: true "
            f"(--data.download true), or unpack {self.files.url} in {self.root}. If it is elsewhere, name the folder "
            f"that has {self.files.base_folder} in it by root (--data.root) or by the environment variable "
            f"{DATA_VARIABLE}"
        )


def _unpickle(path: Path, md5: str) -> dict[str, Any]:
    """Read a pickle if it is the published one, byte for byte."""
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise InputError(
            f"{path} is not the published file and was not opened: its md5 is {found}, expected {md5}. Remove it and "
            "use download: true, or unpack the published archive again"
        )
    batch: dict[str, Any] = pickle.loads(content, encoding="latin1")
    return batch
