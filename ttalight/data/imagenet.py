"""ImageNet and the sets that stand in for it: -C, V2, -R, -A, Sketch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from timm.data import ImageNetInfo  # type: ignore[attr-defined]  # public, but not marked as exported

from ttalight.data.arrays import ImageArrays
from ttalight.data.class_folders import class_files, class_names, corruption_folder
from ttalight.data.download import DATA_VARIABLE
from ttalight.data.image_files import FileDomain, ImageFiles
from ttalight.data.image_folder import ImageFolderDataModule
from ttalight.data.module import Split
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError

__all__ = ["ImageNetDataModule"]


class _Set(NamedTuple):
    folders: tuple[str, ...]
    source: str


_CLEAN = _Set(("val", "imagenet/val", "ILSVRC2012/val"), "https://image-net.org (validation images, a folder a class)")
_CORRUPTED = _Set(("ImageNet-C", "imagenet-c"), "https://zenodo.org/records/2235448")
_SETS = {
    "imagenet_v2": _Set(
        ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "imagenet-v2"),
        "https://huggingface.co/datasets/vaishaal/ImageNetV2",
    ),
    "imagenet_r": _Set(("imagenet-r", "ImageNet-R"), "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"),
    "imagenet_a": _Set(("imagenet-a", "ImageNet-A"), "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar"),
    "imagenet_sketch": _Set(
        ("sketch", "imagenet-sketch", "ImageNet-Sketch"), "https://github.com/HaohanWang/ImageNet-Sketch"
    ),
}
#: Sets of 200 of the classes.
_PARTIAL = ("imagenet_r", "imagenet_a")
_CROP = 224


class ImageNetDataModule(ImageFolderDataModule):
    """Streams over ImageNet's validation images and the public sets that test what a classifier of them can do.

    A domain is ``clean`` (the validation images), a corruption, ``imagenet_v2``, ``imagenet_r``, ``imagenet_a`` or
    ``imagenet_sketch``; any of them may stand in one stream. Folders are looked for in ROOT under the names that the
    archives unpack to:

    - val/<wnid>/*.JPEG
    - ImageNet-C/<corruption>/<severity>/<wnid>/*.JPEG
    - imagenetv2-matched-frequency-format-val/<0 to 999>/*.jpeg
    - imagenet-r/<wnid>/*.jpg, imagenet-a/<wnid>/*.jpg, sketch/<wnid>/*.JPEG

    Classes are the 1,000 of ILSVRC2012 in the order of their WordNet ids (wnid). Images of the stream are decoded when
    a batch is read, by worker processes. The published corrupted images have 224 pixels and are taken as they are; so
    that batches may mix, a stream with such shows the centres of 224 pixels of the others too.

    The classes of ImageNet-R and ImageNet-A are 200 of the 1,000. ``label_space`` says among which a prediction is
    sought, and belongs to the protocol: ``full`` leaves the 1,000 logits, ``restricted`` is their authors' evaluation,
    in which only the logits of those 200 count. Numbers of one kind are not comparable with the other's.

    Sources: O. Russakovsky et al., IJCV 2015, arXiv 1409.0575; D. Hendrycks and T. Dietterich, ICLR 2019,
    arXiv 1903.12261 (-C); B. Recht et al., ICML 2019, arXiv 1902.10811 (V2); D. Hendrycks et al., ICCV 2021,
    arXiv 2006.16241 (-R); D. Hendrycks et al., CVPR 2021, arXiv 1907.07174 (-A); H. Wang et al., NeurIPS 2019,
    arXiv 1905.13549 (Sketch).

    Args:
        root: Folder with the sets; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        label_space: ``full`` or ``restricted``. With the latter a task keeps the rows of its classifier that belong to
            the classes of ``imagenet_r`` or ``imagenet_a``, which must be among the domains; other domains keep their
            images of these classes.
        generate: Make corruptions in memory from the validation images instead of reading ImageNet-C.
        kwargs: See ``ImageFolderDataModule`` and ``ImageDataModule``. Training images are those of ROOT/train. There
            are no images to validate on: the set of that name is what is tested on.

    Raises:
        ValueError: If an argument is out of range, or once data are read, an image cannot be read.
        FileNotFoundError: Once data are read, if a folder is missing or has other classes.
    """

    def __init__(
        self,
        root: str | None = None,
        label_space: Literal["full", "restricted"] = "full",
        generate: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        if label_space not in ("full", "restricted"):
            raise InputError(f"label_space must be full or restricted, got {label_space!r}")
        if self.stream_split != "test":
            raise InputError(
                "ImageNet has no validation images beside those that are tested on: take some of the training images, "
                "for example in a folder of their own with ImageFolderDataModule"
            )
        if label_space == "restricted" and sum(name in self.domains for name in _PARTIAL) != 1:
            raise InputError(
                f"label_space: restricted is to the classes of one of {' and '.join(_PARTIAL)}, and domains has "
                f"{', '.join(self.domains)}: name one of the two, or take label_space: full"
            )
        self.label_space = label_space
        self.generate = generate
        #: The classes of a thousand that predictions are sought among; None for all.
        self.source_classes: tuple[int, ...] | None = None
        self.num_classes = 1000

    def protocol(self) -> dict[str, Any]:
        """Return what of the data's preparation belongs to the protocol of a result."""
        return {**super().protocol(), "label_space": self.label_space, "classes": self.num_classes}

    def setup(self, stage: str) -> None:
        """Read what a stage needs; called by the Trainer."""
        if self.label_space == "restricted":
            name = next(name for name in _PARTIAL if name in self.domains)
            present = set(class_names(self._folder_of(name)))
            self.source_classes = tuple(number for wnid, number in _numbers().items() if wnid in present)
            self.num_classes = len(self.source_classes)
        super().setup(stage)

    def _find(self, split: Split) -> Path | None:
        return None if split == "validation" else super()._find(split)

    def stream_domains(self) -> list[tuple[str, int]]:
        """Return name and severity (0 for all but corruptions) of each domain that the stream is made of."""
        wanted: list[tuple[str, int]] = []
        for name, severity in super().stream_domains():
            key = (name, 0) if name in _SETS else (name, severity)
            if name not in _SETS or key not in wanted:
                wanted.append(key)
        return wanted

    def domain(self, name: str, severity: int | None = None) -> Domain:
        """Return the domain that images of the given name belong to; see the base class."""
        return Domain(name) if name in _SETS else super().domain(name, severity)

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order."""
        wanted = self.stream_domains()
        made = [key for key in wanted if self.generate and _is_corruption(key[0])]
        own = list(dict.fromkeys([*made, *(key for key in wanted if made and key[0] == "clean")]))
        known = dict(zip(own, self.made_domains(self.open("test"), own), strict=True)) if made else {}
        for key in wanted:
            if key not in known:
                known[key] = self._read_domain(*key)
        return [known[key] for key in wanted]

    def _read_domain(self, name: str, severity: int) -> tuple[Domain, ImageArrays]:
        folder = self._folder_of(name)
        if not _is_corruption(name):
            return Domain(name), FileDomain(self._files(folder, name), self.limit)
        files = self._files(corruption_folder(folder, name, severity), name)
        return Domain(name, severity), FileDomain(files, self.limit)

    def open(self, split: Split) -> ImageFiles:
        """Return the clean images of a split, decoded when they are read."""
        if split == "validation":
            raise InputError("ImageNet has no validation images beside those that are tested on: run test instead")
        return self._files(self._folder("train") if split == "train" else self._folder_of("clean"), "clean")

    def _files(self, folder: Path, name: str) -> ImageFiles:
        numbers = {str(number): number for number in range(1000)} if name == "imagenet_v2" else _numbers()
        if self.source_classes is not None:
            place = {number: index for index, number in enumerate(self.source_classes)}
            numbers = {key: place[number] for key, number in numbers.items() if number in place}
        reads_corrupted = not self.generate and any(_is_corruption(domain) for domain in self.domains)
        size = min(_CROP, self.resize) if reads_corrupted else self.resize
        scale = size if _is_corruption(name) else self.resize
        return class_files(folder, numbers, size, scale=scale, interpolation=self.interpolation)

    def _folder_of(self, name: str) -> Path:
        """Return the folder of a domain, in which class folders or, for corruptions, their folders lie."""
        folders, source = _CLEAN if name == "clean" else _SETS.get(name, _CORRUPTED)
        found = next((self.root / folder for folder in folders if (self.root / folder).is_dir()), None)
        if found is not None:
            return found
        ways = ", or make them by generate: true (--data.generate true)" if _is_corruption(name) else ""
        raise MissingFileError(
            f"no {folders[0]} folder in {self.root} ({DATA_VARIABLE} is {os.environ.get(DATA_VARIABLE) or 'not set'}), "
            f"from which {name} is read: get it from {source} and unpack it there{ways}. If it is elsewhere, name the "
            f"folder that has it in it by root (--data.root) or by the environment variable {DATA_VARIABLE}"
        )


def _is_corruption(name: str) -> bool:
    return name != "clean" and name not in _SETS


def _numbers() -> dict[str, int]:
    """Return the number of each of ImageNet's classes: their place among the sorted WordNet ids."""
    wnids: list[str] = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    return {wnid: number for number, wnid in enumerate(sorted(wnids))}
