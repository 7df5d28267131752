"""The predictions of a run on disk: ``predictions.npz``."""

from __future__ import annotations

import math
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from ttalight.errors import InputError, MissingFileError
from ttalight.files.atomic import open_replacing
from ttalight.files.untrusted import DAMAGE, check_archive, read_member

__all__ = ["PREDICTIONS", "PredictionWriter", "merge_predictions", "read_predictions", "writer_fault"]

PREDICTIONS = "predictions.npz"

_PARTS = re.compile(rf"\.{re.escape(PREDICTIONS)}\.\d+\.parts")
_HALF = np.finfo(np.float16)
_TYPES: dict[str, np.dtype[Any]] = {
    "position": np.dtype("<i8"),
    "visit": np.dtype("<i4"),
    "domain": np.dtype("<i4"),
    "sample": np.dtype("<i8"),
    "label": np.dtype("<i4"),
    "prediction": np.dtype("<i4"),
    "logits": np.dtype("<f2"),
}

#: Letters of NumPy's kinds and numbers of dimensions that each column of a file may have.
_EXPECTED: dict[str, tuple[str, Sequence[int]]] = {
    **dict.fromkeys(("position", "visit", "domain", "sample"), ("iu", (1,))),
    **dict.fromkeys(("label", "prediction"), ("iu", range(1, 8))),
    "logits": ("f", range(2, 9)),
    "domains": ("U", (1,)),
}


def check_parts(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Check that the predictions of a run that is resumed are there.

    Args:
        folder: Folder of the run.
        state: See ``PredictionWriter.state``.

    Raises:
        ValueError: If they are not.
    """
    if not _PARTS.fullmatch(str(state["parts"])):  # it would be cut back, and removed at the end
        raise InputError(f"the state of predictions names the folder {state['parts']!r:.60}: start the run again")
    parts = Path(folder) / state["parts"]
    for name, size in _sizes(state).items():
        if not (parts / name).is_file() or (parts / name).stat().st_size < size:
            raise InputError(
                f"the first {state['count']} predictions of the run to resume are not in {parts} any more: start the "
                "run again"
            )


def _sizes(state: Mapping[str, Any]) -> dict[str, int]:
    return {name: state["count"] * kind.itemsize * math.prod(state["shapes"][name]) for name, kind in _TYPES.items()}


class PredictionWriter:
    """Writes predictions batch by batch, without holding them in memory.

    One file a column grows beside the target; ``close`` puts them into ``predictions.npz``, which
    ``np.load(..., allow_pickle=False)`` reads, and replaces an earlier one at once. Columns, of N samples in the order
    in which they came:

    ``position`` (N,) place in the stream; ``visit`` (N,) index of the row in the results; ``domain`` (N,) index into
    ``domains``, their names; ``sample`` (N,) index of the image within its domain's set; ``label`` and ``prediction``
    (N, *), the class and the most likely one; ``logits`` (N, C, *) in half precision, at most 65504 in size.

    Args:
        folder: The run's folder; it is made if need be.
        state: What ``state()`` returned in the run that is resumed: its predictions up to there are kept.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If the predictions of the run that is resumed are not there any more.
    """

    def __init__(self, folder: str | Path, state: Mapping[str, Any] | None = None) -> None:
        self.target = Path(folder) / PREDICTIONS
        if state is not None:
            check_parts(folder, state)
        self._parts = Path(folder) / (f".{PREDICTIONS}.{os.getpid()}.parts" if state is None else str(state["parts"]))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._count = 0
        self._files: dict[str, BinaryIO] = {}
        if state is not None:
            self._resume(state)
        for left in Path(folder).glob(f".{PREDICTIONS}.*.parts"):  # by a run that was killed
            if state is None or left != self._parts:
                shutil.rmtree(left, ignore_errors=True)
        if state is None:
            self._parts.mkdir(parents=True, exist_ok=True)
            self._files = {name: open(self._parts / name, "wb") for name in _TYPES}

    def _resume(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]
        self._shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        for name, size in _sizes(state).items():
            self._files[name] = open(self._parts / name, "r+b")
            self._files[name].truncate(size)
            self._files[name].seek(size)

    def add(self, **columns: npt.NDArray[Any]) -> None:
        """Append a batch.

        Args:
            columns: The columns named above but ``domains``, all of one length; logits of any floating type.

        Raises:
            OSError: If the disk is full.
            ValueError: If the shape of a sample is not that of the batches before.
        """
        for name, file in self._files.items():
            values = columns[name]
            if self._shapes.setdefault(name, values.shape[1:]) != values.shape[1:]:
                raise InputError(
                    f"{name} of shape {values.shape[1:]} a sample after {self._shapes[name]}: predictions are kept as "
                    "one array, so that all images must have one size; switch predictions off"
                )
            if name == "logits":
                values = values.clip(_HALF.min, _HALF.max)  # half precision goes no further
            file.write(np.ascontiguousarray(values, dtype=_TYPES[name]).tobytes())
        self._count += len(columns["position"])

    def state(self) -> dict[str, Any]:
        """Return, as plain values, where the predictions so far are; they are on the disk before this returns."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        return {"parts": self._parts.name, "count": self._count, "shapes": shapes}

    def close(self, domains: Sequence[str], keep_parts: bool = False) -> None:
        """Write the archive and remove the parts.

        Args:
            domains: Names of the domains.
            keep_parts: Leave the parts for a run that continues from a ``state()``.

        Raises:
            OSError: If the disk is full; an earlier archive is kept.
        """
        temporary = self.target.with_name(f".{PREDICTIONS}.{os.getpid()}.tmp")
        try:
            for file in self._files.values():
                file.close()
            if self._count:
                with (
                    open_replacing(self.target, temporary) as file,
                    zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
                ):
                    for name in _TYPES:
                        self._pack(archive, name)
                    with archive.open("domains.npy", "w") as member:
                        np.lib.format.write_array(member, np.array(domains, dtype=np.str_), allow_pickle=False)
        except OSError as error:
            reason = f"{error.strerror or error}: could not write predictions, what was there before is kept"
            raise OSError(error.errno, reason, str(self.target)) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.discard(keep_parts)

    def discard(self, keep_parts: bool = False) -> None:
        """Remove the parts, or leave them for a run that is resumed."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk: what is still in the buffer has no place
                file.close()
        if not keep_parts:
            shutil.rmtree(self._parts, ignore_errors=True)

    def _pack(self, archive: zipfile.ZipFile, name: str) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(_TYPES[name]),
            "fortran_order": False,
            "shape": (self._count, *self._shapes[name]),
        }
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member, open(self._parts / name, "rb") as part:
            np.lib.format.write_array_header_1_0(cast(BinaryIO, member), header)
            shutil.copyfileobj(part, member, 1 << 20)


def writer_fault(state: Any, count: int, classes: int) -> str | None:
    """Return why something cannot be the ``state()`` of a writer, None if it can.

    Args:
        state: What is looked at.
        count: Number of predictions so far.
        classes: Number of classes.
    """
    from ttalight.files.difference import Between, difference  # here, since runs are compared without torch

    form = {"parts": str, "count": Between(count, count), "shapes": dict.fromkeys(_TYPES, list)}
    fault = difference(form, state, "predictions")
    if fault is not None:
        return fault
    if not _PARTS.fullmatch(state["parts"]):
        return f"predictions.parts is {state['parts']!r:.60}"
    pixels = [Between(1, 2**31)] * len(state["shapes"]["label"])
    sides = {"label": pixels, "prediction": pixels, "logits": [Between(classes, classes), *pixels]}
    return difference({name: sides.get(name, []) for name in _TYPES}, state["shapes"], "predictions.shapes", whole=True)


class _Archive:
    """Reads the columns of an archive row by row, from the first on."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        self._members = {name: self._archive.open(f"{name}.npy") for name in _TYPES}
        self._rows: dict[str, tuple[int, ...]] = {}
        for name, member in self._members.items():
            np.lib.format.read_magic(cast(BinaryIO, member))
            self._rows[name] = np.lib.format.read_array_header_1_0(cast(BinaryIO, member))[0][1:]

    def read(self, count: int) -> dict[str, npt.NDArray[Any]]:
        """Return the next so many rows of each column."""
        columns = {}
        for name, member in self._members.items():
            data = member.read(count * _TYPES[name].itemsize * math.prod(self._rows[name]))
            columns[name] = np.frombuffer(data, dtype=_TYPES[name]).reshape(count, *self._rows[name])
        return columns

    def close(self) -> None:
        """Close the file."""
        for member in self._members.values():
            member.close()
        self._archive.close()


def merge_predictions(folder: str | Path, paths: Sequence[Path], domains: Sequence[str], chunk: int = 4096) -> None:
    """Write one ``predictions.npz`` of several that have parts of a stream each, in the order of the stream.

    Args:
        folder: The run's folder.
        paths: The archives, each in the order of the stream.
        domains: Names of the domains.
        chunk: Rows that are in memory at a time, beside the positions of all.

    Raises:
        OSError: If the disk is full.
    """
    positions = [read_predictions(path, "position")["position"] for path in paths]
    owners = np.repeat(np.arange(len(paths)), [len(own) for own in positions])
    owners = owners[np.argsort(np.concatenate([np.empty(0, dtype=np.int64), *positions]), kind="stable")]
    bounds = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    archives, writer = [_Archive(path) for path in paths], PredictionWriter(folder)
    try:
        for start, stop in pairwise(bounds):
            for first in range(start, stop, chunk):
                writer.add(**archives[owners[start]].read(min(chunk, stop - first)))
        writer.close(domains)
    finally:
        for archive in archives:
            archive.close()


def read_predictions(path: str | Path, *columns: str) -> dict[str, npt.NDArray[Any]]:
    """Read columns of ``predictions.npz``.

    Args:
        path: The file, or the folder of the run.
        columns: Names of columns; all but the logits by default.

    Returns:
        Name -> array; see :class:`PredictionWriter`.

    Raises:
        FileNotFoundError: If the run has no predictions.
        ValueError: If the file is damaged, lacks a column, or has one of another type, shape or length.
    """
    path = Path(path)
    path = path / PREDICTIONS if path.is_dir() else path
    wanted = columns or tuple(name for name in (*_TYPES, "domains") if name != "logits")
    if not path.is_file():
        raise MissingFileError(f"no {path}: repeat the run with --predictions true (Recorder(predictions=True))")
    try:
        check_archive(path, whole=False)
        with zipfile.ZipFile(path) as archive:
            arrays = {name: read_member(archive, name, *_EXPECTED[name]) for name in wanted}
        _check_lengths(arrays)
    except DAMAGE as error:
        raise InputError(f"{path} is not a file of predictions, or it is damaged ({error}): repeat the run") from error
    return arrays


def _check_lengths(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    lengths = {name: len(array) for name, array in arrays.items() if name != "domains"}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise InputError(f"its columns must have one length, at least 1, they have {lengths}")
    shapes = {arrays[name].shape for name in ("label", "prediction") if name in arrays}
    if len(shapes) > 1:
        raise InputError(f"label and prediction must have one shape, they have {' and '.join(map(str, shapes))}")
    for name in ("visit", "domain", "sample", "position"):
        if name in arrays and int(arrays[name].min()) < 0:
            raise InputError(f"{name} has {arrays[name].min()}, expected 0 or more")
    if {"domain", "domains"} <= arrays.keys() and int(arrays["domain"].max()) >= len(arrays["domains"]):
        raise InputError(f"domain has {arrays['domain'].max()}, and there are {len(arrays['domains'])} domains")
