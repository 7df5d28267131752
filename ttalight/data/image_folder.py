"""Any folder of images, one subfolder a class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ttalight.data.arrays import ImageArrays
from ttalight.data.class_folders import class_files, class_names
from ttalight.data.download import DATA_VARIABLE, data_root
from ttalight.data.folders import subfolders
from ttalight.data.image_files import FileDomain, ImageFiles, Interpolation
from ttalight.data.module import ImageDataModule, Split
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError

__all__ = ["ImageFolderDataModule"]

_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("val", "validation", "valid"),
    "test": ("test",),
}
_GIGABYTE = 10**9
_MOST_WORKERS = 8


class ImageFolderDataModule(ImageDataModule):
    """Images in ROOT/train, ROOT/val and ROOT/test, each with one subfolder a class, as torchvision's ImageFolder.

    Every image becomes the square centre of ``resize`` pixels, uint8. Training and validation images are decoded when
    a batch is read, by worker processes. The images of the stream are decoded once and stay in memory; corrupted
    domains are made from them when they are first read, all at once, and only as many are kept as ``memory_limit``
    allows. Each corruption is a function of ``seed`` and of the place in the order below, not of the stream.

    Samples stand in a fixed random order that spreads the classes evenly, so that ``limit`` takes a balanced part.
    Classes are those of ROOT/train, by name, or of the split itself where there is no such folder. Without a
    validation folder nothing is validated while training.

    The parameters of the corruptions are ImageNet-C's from 128 pixels on, Tiny-ImageNet-C's from 48 and CIFAR-10-C's
    below; ImageNet-C was made from crops of 224 pixels.

    Args:
        root: Folder with the splits; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        resize: Side of the images in pixels; their shorter side is scaled to it. A network of 224 pixels looks at the
            centre of larger images (``image_size: 224`` of the task); methods that make views see all of them. By
            default it is what the task's pretrained weights were evaluated with, 256 without such.
        interpolation: Filter of the scaling, such as ``bilinear`` or ``bicubic``; by default the pretrained weights'
            one, ``bilinear`` without such.
        num_workers: Processes that decode; by default one a core, eight at most.
        memory_limit: Most gigabytes (10^9 bytes) that images in memory may take.
        kwargs: See ``ImageDataModule``.

    Raises:
        ValueError: If an argument is out of range or, once data are read, an image cannot be read or the images do
            not fit into ``memory_limit``.
        FileNotFoundError: Once data are read, if a folder or the images of a class are missing.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    corruption_chunk = 50  # of 256 pixels a side as many bytes as 3,200 of 32

    def __init__(
        self,
        root: str | None = None,
        resize: int | None = None,
        interpolation: Interpolation | None = None,
        num_workers: int | None = None,
        memory_limit: float = 8.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resize is not None and resize < 1:
            raise InputError(f"resize must be at least 1 pixel, got {resize}")
        if num_workers is not None and num_workers < 0:
            raise InputError(f"num_workers must be at least 0, got {num_workers}")
        if interpolation not in (None, *get_args(Interpolation)):
            known = ", ".join(get_args(Interpolation))
            raise InputError(f"interpolation must be one of {known}, got {interpolation!r}")
        self.root = data_root(root)
        self._given = (resize, interpolation)
        self._set_scaling(resize or 256, interpolation or "bilinear")
        self.num_workers = min(os.cpu_count() or 1, _MOST_WORKERS) if num_workers is None else num_workers
        self.memory_limit = memory_limit

    def _set_scaling(self, resize: int, interpolation: Interpolation) -> None:
        self.resize, self.interpolation = resize, interpolation
        self.corruption_table = "imagenet" if resize >= 128 else "tiny_imagenet" if resize >= 48 else "cifar"

    def _take_preprocessing(self) -> None:
        """Scale images as the weights of the trainer's model expect, as far as no argument says otherwise."""
        expected: Any = getattr(getattr(self.trainer, "lightning_module", None), "preprocessing", None)
        if expected is None:
            return
        resize, interpolation = self._given
        known: Any = expected.interpolation if expected.interpolation in get_args(Interpolation) else "bilinear"
        self._set_scaling(resize or expected.resize or self.resize, interpolation or known)

    def protocol(self) -> dict[str, Any]:
        """Return what of the data's preparation belongs to the protocol of a result."""
        return {"resize": self.resize, "interpolation": self.interpolation}

    def setup(self, stage: str) -> None:
        """Find the classes, and read what a stage needs; called by the Trainer."""
        self._take_preprocessing()
        self.has_validation = self._find("validation") is not None
        super().setup(stage)

    def open(self, split: Split) -> ImageFiles:
        """Return the images of a split, decoded when they are read."""
        folder = self._folder(split)
        classes = self._classes(folder)
        self.num_classes = len(classes)
        numbers = {name: index for index, name in enumerate(classes)}
        return class_files(folder, numbers, self.resize, interpolation=self.interpolation)

    def load(self, split: Split) -> ImageArrays:
        """Return the images of a split, decoded into memory."""
        files = self.open(split)
        self._check_memory(len(files), 1, files.folder)
        return files.decode(len(files), self.num_workers)

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order; corrupted images are made when they are read."""
        return self.made_domains(self.open(self.stream_split), self.stream_domains())

    def made_domains(self, files: ImageFiles, wanted: Sequence[tuple[str, int]]) -> list[tuple[Domain, ImageArrays]]:
        """Return domains that are clean images or corrupted from them; the latter are made when they are read.

        Args:
            files: The clean images.
            wanted: Name and severity (0 for ``clean``) of each domain.
        """
        count = self.clean_needed(len(files))
        made = len({key for key in wanted if key[0] != "clean"})
        kept = min(made, max(1, self._sets_that_fit(count) - 1))
        self._check_memory(count, 1 + kept, files.folder)
        clean = files.decode(count, self.num_workers)
        shown = ImageArrays(clean.images[: self.limit], clean.labels[: self.limit])
        cache = _DomainCache(lambda key: self.corrupted(clean.images, *key), kept)
        return [
            (self.domain(*key), shown if key[0] == "clean" else _GeneratedDomain(shown, key, cache)) for key in wanted
        ]

    def _setup_stream(self) -> None:
        super()._setup_stream()
        assert self._stream_set is not None
        stream, sets = self._stream_set.stream, self._stream_set.domains
        caches = [part.cache for part in sets if isinstance(part, _GeneratedDomain)]
        if not caches or caches[0].capacity >= len(caches):
            return
        changes = np.count_nonzero(np.diff(stream.domain_of(slice(None))))
        window_crosses = stream.window is not None and not stream.announced
        if changes >= len(stream.visits) or window_crosses:
            raise InputError(
                f"this stream comes back to its domains, so all {len(sets)} have to be in memory, and they do not fit "
                f"into memory_limit ({self.memory_limit:g} GB): set limit to fewer images, lower resize, take fewer "
                "domains, or raise memory_limit"
            )

    def _stream_loader(self, num_workers: int = 0) -> DataLoader[Any]:
        assert self._stream_set is not None, "setup('test') comes first"
        # Images that are decoded when they are read are decoded by worker processes.
        decoded = all(isinstance(part, FileDomain) for part in self._stream_set.domains)
        return super()._stream_loader(self.num_workers if decoded else num_workers)

    def _sets_that_fit(self, count: int) -> int:
        return int(self.memory_limit * _GIGABYTE) // (count * 3 * self.resize**2)

    def _check_memory(self, count: int, sets: int, folder: Path) -> None:
        if self._sets_that_fit(count) >= sets:
            return
        size = count * 3 * self.resize**2 / _GIGABYTE
        copies = "" if sets == 1 else " each for the clean images and for those of one corruption"
        raise InputError(
            f"{count:,} images of {folder} take {size:.3g} GB{copies} at {self.resize} x {self.resize} pixels, more "
            f"than memory_limit ({self.memory_limit:g} GB) allows: set limit to fewer images, lower resize, or raise "
            "memory_limit"
        )

    # -- the tree

    def _find(self, split: Split) -> Path | None:
        return next((self.root / name for name in _FOLDERS[split] if (self.root / name).is_dir()), None)

    def _folder(self, split: Split) -> Path:
        folder = self._find(split)
        if folder is not None:
            return folder
        present = subfolders(self.root) if self.root.is_dir() else None
        seen = "does not exist" if present is None else f"has {', '.join(present) or 'no folders'}"
        raise MissingFileError(
            f"no {' or '.join(_FOLDERS[split])} folder in {self.root}, which {seen}: the {split} images belong there, "
            f"one subfolder a class. Another place is named by root (--data.root) or by the environment variable "
            f"{DATA_VARIABLE}"
            + ("; stream_split: validation takes the validation images" if split == "test" and present else "")
        )

    def _classes(self, folder: Path) -> list[str]:
        own = class_names(folder)
        train = self._find("train")
        classes = own if train is None else class_names(train)
        unknown = sorted(set(own) - set(classes))
        if unknown:
            raise InputError(f"{folder} has classes that {train} has not: {_few(unknown)}")
        return classes


class _DomainCache:
    """Keeps the images of the domains that were read last."""

    def __init__(self, make: Callable[[tuple[str, int]], Tensor], capacity: int) -> None:
        self.capacity = capacity
        self._make = make
        self._images: dict[tuple[str, int], Tensor] = {}

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        if key not in self._images:
            while len(self._images) >= self.capacity:  # before the next one needs the room
                del self._images[next(iter(self._images))]
            self._images[key] = self._make(key)
        return self._images[key]


class _GeneratedDomain(ImageArrays):
    """A corrupted domain, made when it is first read.

    Args:
        clean: The images that it is made from.
        key: The corruption and its severity.
        cache: Makes and keeps the corrupted images.
    """

    def __init__(self, clean: ImageArrays, key: tuple[str, int], cache: _DomainCache) -> None:
        super().__init__(clean.images, clean.labels)
        self.key = key
        self.cache = cache

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[Any]) -> tuple[Tensor, ...]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        return self.cache[self.key][index], self.labels[index]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
