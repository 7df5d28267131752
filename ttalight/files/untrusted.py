"""Safe reading of untrusted files: nothing runs, and no more memory is taken than there is a reason for.

What a file claims, the size of an array or of a packed member, is compared with what is there before anything is
allocated.
"""

from __future__ import annotations

import bz2
import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from ttalight.errors import InputError

__all__ = ["DAMAGE", "LARGEST", "check_archive", "inflate", "read_member", "read_npy_header"]

#: What a damaged archive, array, text or JSON makes its reader raise.
DAMAGE = (
    zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError, RuntimeError,
    SyntaxError, OverflowError, MemoryError, RecursionError, tokenize.TokenError, zlib.error,
)  # fmt: skip

#: Bytes that a packed file may unpack to; the largest that is read, SVHN's training images, has 225 million.
LARGEST = 1 << 28
_BLOCK = 1 << 20


def check_archive(file: Path | IO[bytes], whole: bool = True) -> None:
    """Refuse a zip archive that is packed, longer than its file, or damaged.

    PyTorch's checkpoints and NumPy's archives store their members as they are. A packed one may unpack to any size, and
    PyTorch does not compare checksums.

    Args:
        file: The archive.
        whole: Whether all members are read to compare their checksums.

    Raises:
        ValueError: If a member is packed, encrypted, claims more bytes than there are, or does not fit its checksum.
        zipfile.BadZipFile: If it is no archive.
    """
    size = file.stat().st_size if isinstance(file, Path) else file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise InputError(f"its member {member.filename!r:.60} is compressed or encrypted")
        if sum(member.file_size for member in members) > size:
            raise InputError("its members claim more bytes than it has")
        damaged = archive.testzip() if whole else None
    if damaged is not None:
        raise InputError(f"its member {damaged!r:.60} does not fit its checksum")


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a .npy file: shape, whether in Fortran order, type.

    Raises:
        ValueError: If it is damaged, holds Python objects, or its shape is none.
    """
    reader = cast(_Readable, file)
    version = npy.read_magic(reader)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise InputError(f"it is of version {version}")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(reader)
    if dtype.hasobject:
        raise InputError("it holds Python objects, which may run code when they are read")
    if dtype.itemsize == 0:
        raise InputError(f"it has values of type {dtype}, of no bytes")
    if any(isinstance(side, bool) or side < 0 for side in shape):
        raise InputError(f"its shape is {shape}")
    return shape, fortran, dtype


class _Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


def read_member(archive: zipfile.ZipFile, name: str, kinds: str, dimensions: Sequence[int] = ()) -> npt.NDArray[Any]:
    """Read one array of an .npz archive; no more memory is taken than its member is long.

    Args:
        archive: The archive, of members that ``check_archive`` has seen.
        name: Name of the array.
        kinds: Letters of NumPy's kinds that it may have, for example ``iu`` for integers.
        dimensions: Numbers of dimensions that it may have; any by default.

    Raises:
        KeyError: If there is no such array.
        ValueError: If it is damaged, or not as above.
    """
    with archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = read_npy_header(file)
        if dtype.kind not in kinds or (dimensions and len(shape) not in dimensions):
            raise InputError(f"{name} is {dtype} of shape {shape}")
        content = file.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{name} must have {math.prod(shape) * dtype.itemsize:,} bytes, it has {len(content):,}")
    array: npt.NDArray[Any] = np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if fortran else "C").copy()
    return array


def inflate(data: bytes | memoryview, kind: str, most: int = LARGEST) -> bytes:
    """Unpack bytes, up to a limit.

    Args:
        data: What is packed.
        kind: ``gzip``, ``zlib`` or ``bz2``.
        most: Bytes that it may unpack to.

    Raises:
        ValueError: If there are more.
        EOFError: If it is cut short.
    """
    parts: list[bytes] = []
    size, rest = 0, bytes(data)
    while rest and (not parts or rest.strip(b"\0")):  # gzip and bzip2 may have several members, and zeros at the end
        unpack = _unpacker(kind)
        block = unpack.decompress(rest, _BLOCK)
        while True:
            size += len(block)
            if size > most:
                raise InputError(f"it unpacks to more than {most:,} bytes")
            parts.append(block)
            if unpack.eof:
                break
            ahead = getattr(unpack, "unconsumed_tail", b"")
            if not block and not ahead:
                raise EOFError("it is cut short")
            block = unpack.decompress(ahead, _BLOCK)
        rest = unpack.unused_data if kind != "zlib" else b""
    return b"".join(parts)


class _Unpacker(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _unpacker(kind: str) -> _Unpacker:
    makers: dict[str, Callable[[], Any]] = {
        "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
        "zlib": zlib.decompressobj,
        "bz2": bz2.BZ2Decompressor,
    }
    unpacker: _Unpacker = makers[kind]()
    return unpacker
