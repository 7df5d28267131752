"""Image trees with one folder a class."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from ttalight.data.folders import find_files, subfolders
from ttalight.data.image_files import ImageFiles, Interpolation
from ttalight.data.splits import spread_order
from ttalight.errors import MissingFileError

__all__ = ["class_files", "class_names", "corruption_folder"]


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; hidden folders and links to a folder above are none.

    Raises:
        FileNotFoundError: If there are none.
    """
    classes = subfolders(folder) if folder.is_dir() else []
    if not classes:
        raise MissingFileError(
            f"no class folders in {folder}: images belong into one subfolder a class, for example {folder}/cat/1.png"
        )
    return classes


def class_files(
    folder: Path,
    classes: Mapping[str, int],
    size: int,
    *,
    scale: int | None = None,
    interpolation: Interpolation = "bilinear",
) -> ImageFiles:
    """Return the images in the folders of some classes, decoded when they are read.

    They stand in a fixed random order that spreads the classes evenly.

    Args:
        folder: Has one subfolder a class; deeper folders count as part of their class. See `find_files` for hidden
            files and links.
        classes: Name of each class folder that is read, and the label of its images. A class without a folder has no
            images; folders of other names are left out.
        size: See `ImageFiles`.
        scale: See `ImageFiles`.
        interpolation: See `ImageFiles`.

    Raises:
        FileNotFoundError: If the folder of a class has no images, or none of the classes has a folder.
        ValueError: If links make a folder part of two classes.
    """
    present = {name: label for name, label in classes.items() if (folder / name).is_dir()}
    if not present:
        raise MissingFileError(f"no folders of the classes {_few(list(classes))} in {folder}")
    found = find_files(folder, sorted(present), IMG_EXTENSIONS)
    empty = [str(folder / name) for name, own in found.items() if not own]
    if empty:
        raise MissingFileError(
            f"no images in {_few(empty, most=3)}: every class folder needs at least one ({' '.join(IMG_EXTENSIONS)})"
        )
    paths = [path for own in found.values() for path in own]
    numbers = np.array([present[name] for name in found], dtype=np.int64)
    labels = np.repeat(numbers, [len(own) for own in found.values()])
    order = spread_order(labels)
    files = [paths[index] for index in order]
    return ImageFiles(folder, files, torch.from_numpy(labels[order]), size, scale=scale, interpolation=interpolation)


def corruption_folder(folder: Path, corruption: str, severity: int) -> Path:
    """Return where a benchmark of image files has one corruption at one severity: <corruption>/<severity>.

    Raises:
        FileNotFoundError: If there is no such folder; the message lists what is there.
    """
    for parent, name in ((folder, corruption), (folder / corruption, str(severity))):
        if not (parent / name).is_dir():
            present = subfolders(parent)
            near = difflib.get_close_matches(name, present, n=3)
            raise MissingFileError(
                f"no folder {name} in {parent}; there are {', '.join(present) or 'no folders'}"
                + (f"; nearest: {', '.join(near)}" if near else "")
            )
    return folder / corruption / str(severity)


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
