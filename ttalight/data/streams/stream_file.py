"""The file that a stream is kept in: an .npz archive of plain arrays, read without trusting anything in it."""

from __future__ import annotations

import json
import os
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

__all__ = ["read_stream_file", "write_stream_file"]

_HEADER = "header"
_TYPES = {_HEADER: "|u1", "visit": "<u4", "sample": "<u4", "offsets": "<i8"}
_FORMAT = 1
#: What a damaged archive makes the readers of archives, arrays and JSON raise.
_DAMAGE = (
    zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, OSError, RuntimeError, SyntaxError,
    tokenize.TokenError,
)  # fmt: skip


def write_stream_file(path: Path, header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write header and arrays; the file has its name only once it is complete."""
    text = json.dumps({"format": _FORMAT} | header)
    content = {_HEADER: np.frombuffer(text.encode(), dtype=np.uint8)} | arrays
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **{name: content[name].astype(dtype, copy=False) for name, dtype in _TYPES.items()})
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_stream_file(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Read header and arrays; no more memory is taken than the file is long.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one that `write_stream_file` wrote.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved stream {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            arrays = {name: _read(archive, name, np.dtype(dtype), size) for name, dtype in _TYPES.items()}
        header = json.loads(arrays.pop(_HEADER).tobytes())
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise ValueError(f"its header does not say format {_FORMAT}")
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is not a saved stream, or is damaged ({type(error).__name__}: {error}): write it again"
        ) from error
    return header, arrays


def _read(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], most: int) -> npt.NDArray[Any]:
    """Read one array, whose type must be the expected one and whose size that of its place in the archive."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > most:
        raise ValueError(f"{name} is compressed")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        shape, _, found = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        if found != dtype or len(shape) != 1:
            raise ValueError(f"{name} must be {dtype} of shape (N,), it is {found} of shape {shape}")
        content = file.read()
    if len(content) != shape[0] * dtype.itemsize:
        raise ValueError(f"{name} must have {shape[0] * dtype.itemsize:,} bytes, it has {len(content):,}")
    return np.frombuffer(content, dtype=dtype).astype(dtype.newbyteorder("="))
