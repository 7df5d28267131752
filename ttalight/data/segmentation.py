"""Folders of images and label maps: any, CamVid's, Cityscapes' and ACDC's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from ttalight.data.arrays import ImageArrays
from ttalight.data.download import DATA_VARIABLE, data_root
from ttalight.data.folders import find_files
from ttalight.data.image_files import FileDomain
from ttalight.data.label_maps import CAMVID, CAMVID_CLASSES, CITYSCAPES, CITYSCAPES_CLASSES, class_table
from ttalight.data.module import ImageDataModule, Split
from ttalight.data.segmentation_files import Corruption, SegmentationFiles
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError
from ttalight.labels import VOID

__all__ = ["ACDCDataModule", "CamVidDataModule", "CityscapesDataModule", "SegmentationDataModule"]

_DOMAIN, _SPLIT = "{domain}", "{split}"


class SegmentationDataModule(ImageDataModule):
    """Images in one folder and label maps in another, the same tree in both: the class of each pixel.

    Batches are images and maps, uint8 (B, 3, H, W) and (B, H, W), until they are on the device: floats in [0, 1] and
    int64 there. Files are decoded when a batch is read, and corrupted images are made then, each with draws of its own,
    so that memory holds no more than the batches that are read ahead. Images that have several sizes need ``size``, or
    a ``batch_size`` of 1.

    Folders are patterns: ``{split}`` is the name of the split and ``{domain}`` that of a domain, such as the weather.
    Without ``{domain}`` the stream's domains are ``clean`` and corruptions, as of other data modules.

    Args:
        num_classes: Number of classes C; by default those of the data set.
        root: Folder with the data; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        images: Folder of the images within ``root``.
        maps: Folder of the label maps within ``root``.
        image_ending: End of the names of the images, all of the usual formats by default.
        map_ending: What stands in its place in the names of the label maps; ``.png`` by default.
        class_map: Class of each grey level of a label map; grey levels that are not in it do not count. By default
            that of the data set; without one grey levels are classes.
        size: Height and width that images and maps are scaled to.
        domains: Names of the stream's domains.
        stream_split: Split that the stream's images come from.
        num_workers: Processes that decode; by default one a core, eight at most.
        kwargs: See ``ImageDataModule``.

    Raises:
        ValueError: If an argument is out of range or, once data are read, a file cannot be read.
        FileNotFoundError: Once data are read, if a folder is missing, or images or their label maps.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    #: Label of pixels that do not count; tasks and the recorder read it.
    ignore_index = VOID
    #: Names of the splits in the folders.
    split_names: ClassVar[Mapping[Split, str]] = {"train": "train", "validation": "val", "test": "test"}
    #: Names of the classes, of a data set that has such.
    class_names: ClassVar[tuple[str, ...]] = ()
    published_map: ClassVar[Mapping[int, int] | None] = None

    def __init__(
        self,
        num_classes: int | None = None,
        root: str | None = None,
        images: str = "images/{split}",
        maps: str = "labels/{split}",
        image_ending: str = "",
        map_ending: str = ".png",
        class_map: Mapping[int, int] | None = None,
        size: Sequence[int] | None = None,
        domains: Sequence[str] = ("clean",),
        stream_split: Split = "test",
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(domains=domains, **kwargs)
        if num_classes is None and not self.class_names:
            raise InputError("num_classes is missing: give the number of classes of the label maps")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise InputError(f"size must be height and width in pixels, got {list(size)}")
        if (_DOMAIN in images) != (_DOMAIN in maps):
            raise InputError(f"{_DOMAIN} must be in images and maps or in neither, got {images!r} and {maps!r}")
        self.num_classes = len(self.class_names) if num_classes is None else num_classes
        self.root = data_root(root)
        self.images, self.maps = images, maps
        self.image_ending, self.map_ending = image_ending, map_ending
        self.table = class_table(self.published_map if class_map is None else class_map)
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.stream_split = stream_split  # type: ignore[assignment]
        self.num_workers = min(os.cpu_count() or 1, 8) if num_workers is None else num_workers

    @property
    def has_domain_folders(self) -> bool:
        """Whether domains are folders, not corruptions."""
        return _DOMAIN in self.images

    def protocol(self) -> dict[str, Any]:
        """Return what of the data's preparation belongs to the protocol of a result."""
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        return {"size": None if self.size is None else list(self.size), "data_split": self.stream_split, **names}

    def setup(self, stage: str) -> None:
        """Find the files that a stage needs; called by the Trainer."""
        self.has_validation = all(self._folder(self.images, name, "validation").is_dir() for name in self._sources())
        super().setup(stage)

    def _sources(self) -> list[str]:
        """Return the domains that are trained and validated on: all of them."""
        return [name for name in self.domains if self.has_domain_folders] or [""]

    def load(self, split: Split) -> ImageArrays:
        """Return the images of a split, decoded when a batch is read."""
        return FileDomain(self.open(split))

    def open(self, split: Split) -> SegmentationFiles:
        """Return the images of a split, of all domains that are folders, decoded when they are read."""
        return self._files(self._sources(), split)

    def stream_domains(self) -> list[tuple[str, int]]:
        """Return name and severity of each domain; a folder has severity 0.

        Raises:
            ValueError: If the stream asks for clean images beside domains that are folders.
        """
        if not self.has_domain_folders:
            return super().stream_domains()
        if self.order.needs_clean:
            raise InputError(
                f"{type(self.order).__name__} asks for clean images beside the domains, and domain folders have no "
                "such set: take another stream"
            )
        return [(name, 0) for name in self.domains]

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order; images are read when a batch is."""
        if self.has_domain_folders:
            wanted = [(Domain(name), self._files([name], self.stream_split)) for name in self.domains]
        else:
            wanted = [
                (self.domain(*key), self._files([""], self.stream_split, self._corruption(*key)))
                for key in self.stream_domains()
            ]
        return [(domain, FileDomain(files, self.limit)) for domain, files in wanted]

    def _corruption(self, name: str, severity: int) -> Corruption | None:
        return None if name == "clean" else Corruption(name, severity, self.seed, self.frost_dir)

    def _stream_loader(self, num_workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
        return super()._stream_loader(self.num_workers)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn images from uint8 to float in [0, 1] and maps to int64, on the device."""
        images, labels, *rest = super().on_after_batch_transfer(batch, dataloader_idx)
        return (images, labels.long(), *rest)

    # -- the tree

    def _folder(self, pattern: str, domain: str, split: Split) -> Path:
        return self.root / pattern.replace(_DOMAIN, domain).replace(_SPLIT, self.split_names[split])

    def _files(self, domains: Sequence[str], split: Split, corruption: Corruption | None = None) -> SegmentationFiles:
        """Return the images of some domains with their label maps, in the order of folders and names."""
        files: list[str] = []
        maps: list[str] = []
        for domain in domains:
            images, labels = (self._folder(pattern, domain, split) for pattern in (self.images, self.maps))
            names = self._names(images)
            files += [os.path.relpath(images / name, self.root) for name in names]
            maps += [os.path.relpath(labels / self._map_of(name), self.root) for name in names]
            missing = [name for name in names if not (labels / self._map_of(name)).is_file()]
            if missing:
                raise MissingFileError(
                    f"{len(missing)} of {len(names)} images in {images} have no label map, such as "
                    f"{labels / self._map_of(missing[0])}: add the maps, or set maps and map_ending"
                )
        return SegmentationFiles(self.root, files, maps, self.table, self.size, corruption)

    def _names(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            raise MissingFileError(
                f"there is no folder {folder} ({DATA_VARIABLE} is {os.environ.get(DATA_VARIABLE) or 'not set'}): name "
                "the folder with the data by root (--data.root), and those of images and label maps by images and maps"
            )
        endings = (self.image_ending.lower(),) if self.image_ending else IMG_EXTENSIONS
        names = find_files(folder, ["."], endings)["."]
        if not names:
            raise MissingFileError(
                f"no images in {folder}: expected files that end in {' '.join(endings)}, at any depth"
            )
        return [os.path.normpath(name) for name in names]

    def _map_of(self, name: str) -> str:
        stem = name[: -len(self.image_ending)] if self.image_ending else os.path.splitext(name)[0]
        return stem + self.map_ending


class CamVidDataModule(SegmentationDataModule):
    """CamVid in SegNet's layout: ROOT/<split> and ROOT/<split>annot, 11 classes.

    G. Brostow, J. Fauqueur, R. Cipolla, *Semantic object classes in video: A high-definition ground truth database*,
    Pattern Recognition Letters 2009.

    Args:
        images: See ``SegmentationDataModule``.
        maps: See ``SegmentationDataModule``.
        kwargs: See ``SegmentationDataModule`` and ``ImageDataModule``.
    """

    class_names = CAMVID_CLASSES
    published_map = CAMVID

    def __init__(self, images: str = "{split}", maps: str = "{split}annot", **kwargs: Any) -> None:
        super().__init__(images=images, maps=maps, **kwargs)


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes as it is published: ROOT/leftImg8bit/<split> and ROOT/gtFine/<split>, 19 classes.

    M. Cordts et al., *The Cityscapes Dataset for Semantic Urban Scene Understanding*, CVPR 2016, arXiv 1604.01685.
    Labels of the test split are not published, so the stream shows the validation split by default.

    Args:
        stream_split: See ``SegmentationDataModule``.
        kwargs: See ``SegmentationDataModule`` and ``ImageDataModule``.
    """

    class_names = CITYSCAPES_CLASSES
    published_map = CITYSCAPES

    def __init__(self, stream_split: Split = "validation", **kwargs: Any) -> None:
        tree = {
            "images": "leftImg8bit/{split}", "maps": "gtFine/{split}", "image_ending": "_leftImg8bit.png",
            "map_ending": "_gtFine_labelIds.png",
        }  # fmt: skip
        super().__init__(stream_split=stream_split, **(tree | kwargs))


class ACDCDataModule(SegmentationDataModule):
    """ACDC as it is published: ROOT/rgb_anon/<domain>/<split> and ROOT/gt/<domain>/<split>, Cityscapes' 19 classes.

    C. Sakaridis, D. Dai, L. Van Gool, *ACDC: The Adverse Conditions Dataset with Correspondences for Semantic Driving
    Scene Understanding*, ICCV 2021, arXiv 2104.13395. Q. Wang et al., *Continual Test-Time Domain Adaptation*, CVPR
    2022, arXiv 2203.13591, adapt to the training images of the four conditions in ten rounds:
    ``ACDCDataModule(stream_split="train", stream=Continual(rounds=10, shuffle=False), batch_size=1)``.

    Args:
        domains: Names of the conditions.
        stream_split: See ``SegmentationDataModule``.
        kwargs: See ``SegmentationDataModule`` and ``ImageDataModule``.
    """

    class_names = CITYSCAPES_CLASSES
    published_map = CITYSCAPES

    def __init__(
        self,
        domains: Sequence[str] = ("fog", "night", "rain", "snow"),
        stream_split: Split = "validation",
        **kwargs: Any,
    ) -> None:
        tree = {
            "images": "rgb_anon/{domain}/{split}", "maps": "gt/{domain}/{split}", "image_ending": "_rgb_anon.png",
            "map_ending": "_gt_labelIds.png",
        }  # fmt: skip
        super().__init__(domains=domains, stream_split=stream_split, **(tree | kwargs))
