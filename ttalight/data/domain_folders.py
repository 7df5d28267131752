"""Image sets of several domains, one folder a domain: PACS, Office-Home, DomainNet and others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ttalight.data.arrays import ImageArrays
from ttalight.data.class_folders import class_files, class_names
from ttalight.data.download import DATA_VARIABLE
from ttalight.data.image_files import FileDomain, ImageFiles
from ttalight.data.image_folder import ImageFolderDataModule
from ttalight.data.module import Split
from ttalight.data.splits import held_out
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError

__all__ = ["DomainFoldersDataModule"]


class DomainFoldersDataModule(ImageFolderDataModule):
    """Images in ROOT/<domain>/<class>/: trained on in some domains, adapted to others.

    Classes are those of all domains together, by name. The images of a source domain are parted once and for all,
    classes spread evenly: the share ``validation`` is held out of training. A stream shows all images of a domain
    that is not a source, and the held-out ones of a source.

    For PACS (D. Li et al., ICCV 2017, arXiv 1710.03077), Office-Home (H. Venkateswara et al., CVPR 2017,
    arXiv 1706.07522), DomainNet (X. Peng et al., ICCV 2019, arXiv 1812.01754) and any set in such folders.

    Args:
        root: Folder with the domains; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        sources: Domains that are trained and validated on.
        domains: Domains of the stream, in order; by default all that are no sources.
        validation: Share of the images of a source that is held out, from 0 to 1.
        kwargs: See ``ImageFolderDataModule`` and ``ImageDataModule``. With ``stream_split: validation`` the stream's
            domains must be sources, whose labels may be seen.

    Raises:
        ValueError: If an argument is out of range or, once data are read, an image cannot be read.
        FileNotFoundError: Once data are read, if a folder or the images of a class are missing.
    """

    def __init__(
        self,
        root: str | None = None,
        sources: Sequence[str] = (),
        domains: Sequence[str] | None = None,
        validation: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, domains=("clean",) if domains is None else domains, **kwargs)
        if not 0 <= validation < 1:
            raise InputError(f"validation must be a share from 0 up to, not including, 1, got {validation}")
        self._all_others = domains is None
        self.sources = tuple(sources)
        self.validation = validation

    def setup(self, stage: str) -> None:
        """Find domains and classes, and read what a stage needs; called by the Trainer."""
        present = class_names(self._root())
        if self._all_others:
            self.domains = tuple(name for name in present if name not in self.sources)
        unknown = [name for name in (*self.sources, *self.domains) if name not in present]
        if unknown or not self.domains:
            raise MissingFileError(
                f"no domain {', '.join(unknown) or 'beside the sources'} in {self.root}; there are {', '.join(present)}"
            )
        self.classes = sorted({name for domain in present for name in class_names(self.root / domain)})
        self.num_classes = len(self.classes)
        super().setup(stage)

    def _root(self) -> Path:
        if self.root.is_dir():
            return self.root
        raise MissingFileError(
            f"there is no folder {self.root} ({DATA_VARIABLE} is {os.environ.get(DATA_VARIABLE) or 'not set'}): "
            "expected domains in it, each with one subfolder a class. Name it by root (--data.root)"
        )

    def _find(self, split: Split) -> Path | None:
        return None if split == "validation" and self.validation == 0 else self.root

    def protocol(self) -> dict[str, Any]:
        """Return what of the data's preparation belongs to the protocol of a result."""
        return {**super().protocol(), "sources": list(self.sources)}

    def open(self, split: Split) -> ImageFiles:
        """Return the images of the source domains, decoded when they are read."""
        if not self.sources:
            raise InputError("there is nothing to train or validate on: name the source domains by sources")
        parts = [self._part(name, split) for name in self.sources]
        files = [
            os.path.join(name, os.fsdecode(bytes(file)))
            for name, part in zip(self.sources, parts, strict=True)
            for file in part.files
        ]
        labels = torch.cat([part.labels for part in parts])
        return ImageFiles(self.root, files, labels, self.resize, interpolation=self.interpolation)

    def _part(self, domain: str, split: Split) -> ImageFiles:
        """Return the images of a domain: the training or the held-out part, or with ``test`` all."""
        numbers = {name: index for index, name in enumerate(self.classes)}
        files = class_files(self.root / domain, numbers, self.resize, interpolation=self.interpolation)
        if split == "test":
            return files
        return files.part(held_out(files.labels, round(len(files) * self.validation), split))

    def stream_domains(self) -> list[tuple[str, int]]:
        """Return the stream's domains; they have no severity.

        Raises:
            ValueError: If the stream asks for clean images beside them.
        """
        if self.order.needs_clean:
            raise InputError(
                f"{type(self.order).__name__} asks for clean images beside the domains, and domain folders have no "
                "such set: take another stream"
            )
        return [(name, 0) for name in self.domains]

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of the stream, in the order of ``domains``."""
        others = [name for name in self.domains if name not in self.sources]
        if self.stream_split == "validation" and others:
            raise InputError(
                f"stream_split is validation, and {', '.join(others)} is not among the sources: hyper-parameters "
                "are chosen on held-out images of the sources only"
            )
        return [
            (Domain(name), FileDomain(self._part(name, "validation" if name in self.sources else "test"), self.limit))
            for name, _ in self.stream_domains()
        ]
