"""The layout that the public corruption benchmarks are published in: one .npy file a corruption, and labels.npy."""

from __future__ import annotations

import difflib
import json
import math
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy

from ttalight.data.arrays import ImageArrays
from ttalight.errors import InputError, InputTypeError, MissingFileError
from ttalight.files.atomic import open_replacing
from ttalight.files.untrusted import read_npy_header

__all__ = [
    "LABELS",
    "SETTINGS",
    "CorruptedFolder",
    "check_images",
    "check_labels",
    "read_npy",
    "read_settings",
    "write_npy",
    "write_settings",
]

LABELS = "labels.npy"
#: File with the settings of a generated folder; the published sets have none.
SETTINGS = "corruptions.json"

_PUBLISHED = {"severities": [1, 2, 3, 4, 5], "split": "test", "frost": None}


class CorruptedFolder:
    """A folder with ``<corruption>.npy``, uint8 (S * N, H, W, 3), and ``labels.npy``, (S * N,).

    The images of the S severities, five in the published sets, stand one block of N after the other, mildest first.
    Files are mapped, not read: only the rows that are asked for are copied into memory.

    Args:
        folder: The folder.

    Raises:
        ValueError: If its ``corruptions.json`` cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = _PUBLISHED | (read_settings(folder) or {})
        #: The severities that the files hold, in order.
        self.severities: list[int] = settings["severities"]
        #: Split that the images were made from.
        self.split: str = settings["split"]
        #: ``procedural`` or the folder with the pictures of frost; None if it is not known.
        self.frost: str | None = settings["frost"]

    @property
    def exists(self) -> bool:
        """Return whether there is anything to read."""
        return bool(self._arrays())

    def _arrays(self) -> list[str]:
        return [file.name for file in self.folder.glob("*.npy") if not file.name.startswith(".")]

    def path(self, corruption: str) -> Path:
        """Return where the images of a corruption are."""
        return self.folder / f"{corruption}.npy"

    def read(self, corruption: str, severity: int, num_classes: int, limit: int | None = None) -> ImageArrays:
        """Read the images of one corruption at one severity.

        Args:
            corruption: Name of the corruption: that of the file without ``.npy``.
            severity: The severity.
            num_classes: Labels must be below this.
            limit: Read the first so many only.

        Raises:
            FileNotFoundError: If a file is missing; the message lists what is there.
            ValueError: If a file is damaged or not as described above, or has no such severity.
        """
        if severity not in self.severities:
            raise InputError(f"{self.folder} has severities {self.severities}, not {severity}")
        images, labels = self._map(self.path(corruption)), self._map(self.folder / LABELS)
        check_images(images, self.path(corruption), len(self.severities))
        check_labels(labels, self.folder / LABELS, len(images), self.path(corruption), num_classes)
        count = len(images) // len(self.severities)
        start = self.severities.index(severity) * count
        rows = slice(start, start + (count if limit is None else min(count, limit)))
        pixels = np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2))
        return ImageArrays(torch.from_numpy(pixels), torch.from_numpy(labels[rows].astype(np.int64)))

    def _map(self, path: Path) -> npt.NDArray[Any]:
        if not path.is_file():
            present = sorted(name.removesuffix(".npy") for name in self._arrays() if name != LABELS)
            near = difflib.get_close_matches(path.stem, present, n=3)
            raise MissingFileError(
                f"no {path.name} in {self.folder}; there are {', '.join(present) or 'no .npy files'}"
                + (f"; nearest: {', '.join(near)}" if near else "")
            )
        return read_npy(path)


def check_images(images: npt.NDArray[Any], path: Path, severities: int) -> None:
    """Raise a ValueError if an array of images is not uint8 (severities * N, H, W, 3)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"{path} must hold uint8 RGB images of shape (rows, H, W, 3), it has {images.dtype} of shape {images.shape}"
        )
    if len(images) == 0 or len(images) % severities:
        raise InputError(
            f"{path} has {len(images)} images, expected a multiple of {severities}: one block a severity, equally long"
        )


def check_labels(labels: npt.NDArray[Any], path: Path, rows: int, images: Path, num_classes: int) -> None:
    """Raise a ValueError if an array of labels is not integers from 0, one for each of ``rows`` images."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(f"{path} must hold integers of shape (rows,), it has {labels.dtype} of shape {labels.shape}")
    if len(labels) != rows:
        raise InputError(f"{path} has {len(labels)} labels, but {images} has {rows} images: one label an image")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{path} has labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}: is it of "
            "another data set?"
        )


def read_npy(path: Path) -> npt.NDArray[Any]:
    """Map a .npy file; nothing in it is ever unpickled.

    Raises:
        ValueError: If the file is not a complete .npy file, or holds Python objects.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError("not a plain file")  # a pipe would be waited for
        with path.open("rb") as file:
            shape, _, dtype = read_npy_header(file)
            missing = file.tell() + math.prod(shape) * dtype.itemsize - path.stat().st_size
        if missing <= 0:
            array: npt.NDArray[Any] = (
                np.load(path, mmap_mode="r", allow_pickle=False)
                if math.prod(shape)
                else np.empty(shape, dtype)  # there is nothing to map
            )
            return array
    except OSError:
        raise
    except Exception as error:  # exceptions of the header's parser have no common base class
        if "Python objects" in str(error):
            raise InputError(
                f"{path} holds Python objects, which may run code when they are read: it was not opened"
            ) from error
        raise InputError(f"{path} is not a .npy file ({error}): copy it again") from error
    raise InputError(f"{path} is cut short: {missing:,} bytes are missing at its end; copy it again")


def write_npy(path: Path, shape: Sequence[int], dtype: npt.DTypeLike, parts: Iterable[npt.NDArray[Any]]) -> None:
    """Write a .npy file part by part; it has its name only once it is complete.

    Args:
        path: Where it goes; until it is complete it is ``<name>.part``.
        shape: Shape of the whole array.
        dtype: Its type.
        parts: Arrays that make up the whole, along the first axis.
    """
    with open_replacing(path) as file:
        header = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
        npy.write_array_header_1_0(file, header)
        for array in parts:
            file.write(np.ascontiguousarray(array, dtype=dtype).data)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return what ``corruptions.json`` in a folder says, or None if there is no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
        _check_settings(settings)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}): write the set again") from error
    return {"frost": None, **settings}


def _check_settings(settings: Any) -> None:
    severities, names = settings["severities"], settings.get("corruptions", [])
    if not isinstance(severities, list) or not severities or len(set(map(str, severities))) < len(severities):
        raise InputTypeError("severities must be a list of different integers")
    if not all(type(severity) is int for severity in severities):
        raise InputTypeError("severities must be integers")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputTypeError("corruptions must be a list of names")
    if not isinstance(settings["split"], str) or not isinstance(settings.get("frost"), (str, type(None))):
        raise InputTypeError("split must be a string, and frost a string or null")


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write ``corruptions.json`` into a folder."""
    with open_replacing(folder / SETTINGS) as file:
        file.write(f"{json.dumps(settings, indent=2)}\n".encode())
