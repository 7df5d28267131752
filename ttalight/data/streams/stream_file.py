"""The file that a stream is kept in: an .npz archive of plain arrays, read without trusting anything in it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ttalight.errors import InputError, MissingFileError
from ttalight.files.atomic import open_replacing
from ttalight.files.untrusted import DAMAGE, check_archive, read_member

__all__ = ["read_stream_file", "write_stream_file"]

_HEADER = "header"
_TYPES = {_HEADER: "|u1", "visit": "<u4", "sample": "<u4", "offsets": "<i8"}
_FORMAT = 1


def write_stream_file(path: Path, header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write header and arrays; the file has its name only once it is complete."""
    text = json.dumps({"format": _FORMAT} | header)
    content = {_HEADER: np.frombuffer(text.encode(), dtype=np.uint8)} | arrays
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_replacing(path) as file:
        np.savez(file, **{name: content[name].astype(dtype, copy=False) for name, dtype in _TYPES.items()})


def read_stream_file(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Read header and arrays; no more memory is taken than the file is long.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one that `write_stream_file` wrote.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no saved stream {path}")
    try:
        check_archive(path, whole=False)
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _read(archive, name, np.dtype(dtype)) for name, dtype in _TYPES.items()}
        header = json.loads(arrays.pop(_HEADER).tobytes())
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise InputError(f"its header does not say format {_FORMAT}")
    except DAMAGE as error:
        raise InputError(
            f"{path} is not a saved stream, or is damaged ({type(error).__name__}: {error}): write it again"
        ) from error
    return header, arrays


def _read(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Read one array, whose type must be the expected one."""
    array = read_member(archive, name, "biufcmMSUV")
    if array.dtype != dtype or array.ndim != 1:
        raise InputError(f"{name} must be {dtype} of shape (N,), it is {array.dtype} of shape {array.shape}")
    return array.astype(dtype.newbyteorder("="), copy=False)
