"""The file formats that MNIST, USPS and SVHN are published in."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ttalight.errors import InputError
from ttalight.files.untrusted import DAMAGE, inflate

__all__ = ["read_idx", "read_libsvm", "read_mat"]

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
#: Types of MATLAB 5 elements that arrays of numbers consist of.
_MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MAT_MATRIX, _MAT_COMPRESSED = 14, 15


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Read an array in the IDX format of MNIST, plain or packed (.gz).

    Raises:
        ValueError: If the file is damaged or of another kind.
    """
    try:
        content = inflate(path.read_bytes(), "gzip") if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
        if zero != 0:
            raise InputError("it does not begin with two zero bytes")
        pixels = np.frombuffer(content, _IDX_TYPES[kind], offset=4 + 4 * axes)
        array = pixels.reshape(shape)
    except (*DAMAGE, struct.error) as error:
        raise InputError(
            f"{path} is not a complete IDX file ({type(error).__name__}: {error}): get it again"
        ) from error
    return array.astype(array.dtype.newbyteorder("="))


def read_libsvm(path: Path, features: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Read samples in LIBSVM's format, one a line: label, then index:value; packed with bzip2 if its name ends in .bz2.

    Args:
        path: The file.
        features: Number of values of a sample; indices count from 1, and what is not named is 0.

    Returns:
        Values (N, features) and labels (N,).

    Raises:
        ValueError: If the file is damaged or of another kind.
    """
    try:
        content = inflate(path.read_bytes(), "bz2") if path.suffix == ".bz2" else path.read_bytes()
        lines = content.decode("ascii").splitlines()
        values, labels = np.zeros((len(lines), features)), np.zeros(len(lines), dtype=np.int64)
        for row, line in enumerate(lines):
            label, *pairs = line.split()
            labels[row] = int(float(label))
            table = np.array([pair.split(":") for pair in pairs], dtype=np.float64)
            index = table[:, 0].astype(np.int64) - 1
            if index.min() < 0:
                raise InputError("indices count from 1")
            values[row, index] = table[:, 1]
    except DAMAGE as error:
        raise InputError(
            f"{path} is not a complete LIBSVM file of {features} values a line ({type(error).__name__}: {error}): get "
            "it again"
        ) from error
    return values, labels


def read_mat(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays of real numbers in a MATLAB 5 file, such as SVHN's cropped digits.

    Anything else in the file is left out; nothing in it can run code. Layout: *MAT-File Format*, The MathWorks.

    Raises:
        ValueError: If the file is damaged or of another version.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        content = memoryview(path.read_bytes())
        order = {b"IM": "<", b"MI": ">"}[bytes(content[126:128])]
        place = 128
        while place < len(content):
            kind, data, place = _element(content, place, order)
            if kind == _MAT_COMPRESSED:
                kind, data, _ = _element(memoryview(inflate(data, "zlib")), 0, order)
            if kind == _MAT_MATRIX:
                arrays |= _matrix(data, order)
    except (*DAMAGE, struct.error) as error:
        raise InputError(
            f"{path} is not a complete MATLAB 5 file ({type(error).__name__}: {error}): get it again"
        ) from error
    return arrays


def _element(content: memoryview, place: int, order: str) -> tuple[int, memoryview, int]:
    """Return type and data of the element at a place, and where the next one begins."""
    kind, size = struct.unpack_from(f"{order}II", content, place)
    if kind >> 16:  # a small element: type and size share four bytes, the data are in the other four
        kind, size = kind & 0xFFFF, kind >> 16
        return kind, content[place + 4 : place + 4 + size], place + 8
    start, end = place + 8, place + 8 + size
    if end > len(content):
        raise InputError(f"{end - len(content):,} bytes are missing at its end")
    return kind, content[start:end], end if kind == _MAT_COMPRESSED else end + -size % 8


def _matrix(data: memoryview, order: str) -> dict[str, npt.NDArray[Any]]:
    parts: list[tuple[int, memoryview]] = []
    place = 0
    while place < len(data) and len(parts) < 4:  # flags, shape, name, real part
        kind, part, place = _element(data, place, order)
        parts.append((kind, part))
    flags = struct.unpack_from(f"{order}I", parts[0][1])[0]
    if not 6 <= flags & 0xFF <= 15 or flags & 0x800:  # cells, structures, objects, text; complex numbers
        return {}
    shape = np.frombuffer(parts[1][1], f"{order}i4")
    values = np.frombuffer(parts[3][1], f"{order}{_MAT_TYPES[parts[3][0]]}")
    return {bytes(parts[2][1]).decode("ascii"): values.reshape(shape, order="F")}
