"""CIFAR-10-C and CIFAR-100-C, read from the public files or made from the clean test images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ttalight.data.arrays import ImageArrays
from ttalight.data.cifar import CIFARDataModule
from ttalight.data.corruptions import COMMON, EXTRA, FROST_PROCEDURAL
from ttalight.data.download import DATA_VARIABLE, data_root, fetch, unpack
from ttalight.data.layout import LABELS, CorruptedFolder
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError

__all__ = ["CorruptedDataModule"]

#: Name of the folder, address of the archive and its MD5 as Zenodo lists them (records 2535967 and 3555552).
_PUBLISHED = {
    "cifar10": (
        "CIFAR-10-C",
        "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar",
        "56bf5dcef84df0e2308c6dcbcbbd8499",
    ),
    "cifar100": (
        "CIFAR-100-C",
        "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar",
        "11f0ed0f1191edbf9fa23466ae6021d3",
    ),
}


class CorruptedDataModule(CIFARDataModule):
    """CIFAR with the corrupted test images of the public benchmarks, or with corruptions made here.

    Reads the published layout, as it comes from the archives and as ``ttalight corrupt`` writes it:
    ``<corruption>.npy`` and ``labels.npy``, see `CorruptedFolder`. Where there are no such files, ``generate`` makes
    the images in memory from the clean ones; they are those that ``ttalight corrupt`` writes with the same seed. The
    domain ``clean`` and training need the clean set.

    D. Hendrycks and T. Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*,
    ICLR 2019, arXiv 1903.12261.

    Args:
        dataset: ``cifar10`` or ``cifar100``.
        root: Folder that holds the layout, or folder with data sets that has ``CIFAR-10-C`` (``CIFAR-100-C``) in it; by
            default what the environment variable TTALIGHT_DATA names, else ``data``. The clean set is looked for in the
            latter; where ``root`` is the layout itself, in the default folder.
        domains: Names of the stream's domains; by default the fifteen corruptions.
        generate: Make the corruptions where there is no such folder.
        download: Fetch what is missing: the archive (2.9 GB), or with ``generate`` the clean set.
        kwargs: See ``CIFARDataModule`` and ``ImageDataModule``. With ``stream_split: validation`` the images are those
            of the validation split, which only ``generate`` can make.

    Raises:
        ValueError: If an argument is out of range or, once data are read, a file is damaged or of another kind.
        FileNotFoundError: Once data are read, if files are missing.
    """

    def __init__(
        self,
        dataset: Literal["cifar10", "cifar100"] = "cifar10",
        root: str | None = None,
        domains: Sequence[str] = COMMON,
        generate: bool = False,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        if dataset not in _PUBLISHED:
            raise InputError(
                f"corrupted images are published of {' and '.join(_PUBLISHED)}, not of {dataset}: use CIFARDataModule, "
                "which makes them from any set"
            )
        super().__init__(dataset=dataset, root=root, domains=domains, download=download, **kwargs)
        if self.severity not in range(1, 6):
            raise InputError(f"severity must be an integer from 1 (mild) to 5 (strong), got {self.severity}")
        self.generate = generate
        self.archive = _PUBLISHED[dataset]
        #: Whether ``root`` is the layout itself.
        self.is_layout = any((self.root / f"{name}.npy").is_file() for name in (*COMMON, *EXTRA, *domains))
        self.corrupted_folder = self.root if self.is_layout else self.root / self.archive[0]
        if self.is_layout:
            self.root = data_root(None)

    def prepare_data(self) -> None:
        """Fetch what was asked for and is missing; the Trainer calls this on one process."""
        if not self.download:
            return
        if not (self.generate or self.is_layout) and not all(path.is_file() for path in self._needed()):
            self.fetch_corrupted()
        if self.generate or ("clean", 0) in self.stream_domains():
            self.fetch_clean()

    def fetch_corrupted(self) -> None:
        """Download and unpack the published archive."""
        name, url, md5 = self.archive
        archive = self.root / f"{name}.tar"
        fetch(url, archive, md5)
        files = [f"{corruption}.npy" for corruption in COMMON + EXTRA]
        unpack(archive, self.root, [f"{name}/{file}" for file in [*files, LABELS]])

    def _needed(self) -> list[Path]:
        names = dict.fromkeys(name for name in self.domains if name != "clean")
        return [self.corrupted_folder / file for file in [*(f"{name}.npy" for name in names), LABELS] if names]

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order, with their images."""
        folder = CorruptedFolder(self.corrupted_folder)
        if not self._needed() or (self.generate and not (folder.exists and folder.split == self.stream_split)):
            return super().load_domains()
        if not folder.exists:
            raise MissingFileError(self._how_to_get())
        if folder.split != self.stream_split:
            raise InputError(
                f"{folder.folder} was made from the {folder.split} images, and stream_split is {self.stream_split}: "
                f"use generate: true (--data.generate true) to make the corruptions from the {self.stream_split} images"
            )
        wanted = self.stream_domains()
        read = {key: self._read_domain(folder, *key) for key in dict.fromkeys(wanted)}
        return [(domain, self.of_classes(arrays)) for domain, arrays in (read[key] for key in wanted)]

    def _read_domain(self, folder: CorruptedFolder, name: str, severity: int) -> tuple[Domain, ImageArrays]:
        if name == "clean":
            clean = self.load(self.stream_split)
            return Domain(name), ImageArrays(clean.images[: self.limit], clean.labels[: self.limit])
        procedural = name == "frost" and folder.frost == FROST_PROCEDURAL
        domain = Domain(f"frost_{FROST_PROCEDURAL}" if procedural else name, severity)
        images = folder.read(name, severity, self.set_classes, self.limit)
        height, width = images.images.shape[2:]
        if (height, width) != (32, 32):
            raise InputError(
                f"{folder.path(name)} has images of {height} x {width} pixels, {self.dataset} has 32 x 32: is it of "
                "another data set?"
            )
        return domain, images

    def _how_to_get(self) -> str:
        name, url, _ = self.archive
        return (
            f"no {name} in {self.corrupted_folder} ({DATA_VARIABLE} is {os.environ.get(DATA_VARIABLE) or 'not set'}): "
            f"expected {', '.join(path.name for path in self._needed())}. There are two ways: get the published images "
            f"by download: true (--data.download true, 2.9 GB) or by unpacking {url} there, or make them from the "
            f"clean images by generate: true (--data.generate true). If the folder is elsewhere, name it, or the one "
            f"that has it in it, by root (--data.root) or by the environment variable {DATA_VARIABLE}"
        )
