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
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy

from ttalight.errors import InputError

__all__ = [
    "DAMAGE",
    "LARGEST",
    "Between",
    "check_archive",
    "difference",
    "inflate",
    "known",
    "load_tensors",
    "read_member",
    "read_npy_header",
]

#: What a damaged archive, array, text or JSON makes its reader raise.
DAMAGE = (
    zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError, RuntimeError,
    SyntaxError, OverflowError, MemoryError, RecursionError, tokenize.TokenError, zlib.error,
)  # fmt: skip

#: Bytes that a packed file may unpack to; the largest that is read, SVHN's training images, has 225 million.
LARGEST = 1 << 28
_BLOCK = 1 << 20
#: So many times as large as their storages the tensors of a file may be: weights are shared by some layers.
_MOST_SHARED = 16


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


def load_tensors(file: Path | bytes) -> Any:
    """Read what ``torch.save`` wrote, tensors and plain values only.

    Args:
        file: A file, or its content.

    Raises:
        Exception: Whatever archive, unpickler and tensors say of damage; there is no common base class.
    """
    stream: IO[bytes] = io.BytesIO(file) if isinstance(file, bytes) else file.open("rb")
    with stream:
        if zipfile.is_zipfile(stream):  # files from before PyTorch 1.6 are none
            check_archive(stream)
        stream.seek(0)
        content = torch.load(stream, map_location="cpu", weights_only=True)
    _check_extent(content)
    return content


def _check_extent(content: Any) -> None:
    """Refuse tensors that are larger than what they are stored in, which a copy would make real."""
    left, seen = [content], set()
    stored: dict[int, int] = {}
    size = 0
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            _check_tensor(value)
            storage = value.untyped_storage()
            stored[storage._cdata] = storage.nbytes()
            size += value.numel() * value.element_size()
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            left += [*value, *value.values()] if isinstance(value, dict) else value
    if size > _MOST_SHARED * sum(stored.values()) + 64 * _BLOCK:
        raise InputError(f"it has tensors of {size:,} bytes that are stored in {sum(stored.values()):,}")


def _check_tensor(value: torch.Tensor) -> None:
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        raise InputError(f"it has a tensor of layout {value.layout} on {value.device}, expected plain ones")
    is_larger = value.numel() * value.element_size() > value.untyped_storage().nbytes()
    if is_larger and value.numel() > _BLOCK:
        raise InputError(f"it has a tensor of shape {tuple(value.shape)} that is stored as one of fewer values")


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


class Between(NamedTuple):
    """Numbers from ``low`` to ``high``, whole ones if ``low`` is an int."""

    low: float
    high: float


def difference(expected: Any, seen: Any, name: str = "", whole: bool = False) -> str | None:
    """Return the first difference of two structures in names, types and shapes, None if there is none.

    Args:
        expected: Dicts, lists, tensors and plain values, or a type or ``Between`` instead of a value. None stands for
            anything.
        seen: What should be like it.
        name: Name of both.
        whole: Whether dicts may have no further entries. Where they may, an empty dict or list stands for any.
    """
    label = name or "state"
    if expected is None:
        return None
    kind = expected if isinstance(expected, type) else type(expected)
    if isinstance(expected, Between):
        return _number_difference(expected, seen, label)
    if isinstance(expected, torch.Tensor) and isinstance(seen, torch.Tensor):
        return _tensor_difference(expected, seen, label)
    if isinstance(expected, dict) and isinstance(seen, dict):
        missing = [str(key) for key in expected if key not in seen]
        odd = [f"{key!s:.50}" for key in seen if key not in expected] if whole else []
        if missing or odd:
            return f"{label} {'lacks' if missing else 'has the unknown'} {', '.join((missing or odd)[:5])}"
        prefix = f"{name}." if name else ""
        found = (difference(value, seen[key], f"{prefix}{key}", whole) for key, value in expected.items())
    elif isinstance(expected, (list, tuple)) and isinstance(seen, (list, tuple)):
        if len(seen) != len(expected) and (expected or whole):
            return f"{label} has {len(seen)} entries, expected {len(expected)}"
        pairs = enumerate(zip(expected, seen, strict=False))
        found = (difference(*both, f"{label}[{index}]", whole) for index, both in pairs)
    elif not _is_of(seen, kind):
        return f"{label} is of type {type(seen).__name__}, expected {kind.__name__}"
    elif type(seen) is type(expected) is float and math.isnan(seen) and not math.isnan(expected):
        return f"{label} is nan"
    else:
        return None
    return next((fault for fault in found if fault is not None), None)


def _is_of(value: Any, kind: type) -> bool:
    if {type(value), kind} <= {int, float}:
        return True
    return isinstance(value, dict) if kind is dict else type(value) is kind


def known(value: Any, other: Any) -> Any:
    """Return a copy of nested dicts with the entries that are in another structure as well; an empty one has any."""
    if not (isinstance(value, dict) and isinstance(other, dict) and other):
        return value
    return {name: known(part, other[name]) for name, part in value.items() if name in other}


def _number_difference(expected: Between, seen: Any, label: str) -> str | None:
    allowed = (int,) if type(expected.low) is int else (int, float)
    if type(seen) not in allowed:
        return f"{label} is of type {type(seen).__name__}, expected {'int' if len(allowed) == 1 else 'float'}"
    if not expected.low <= seen <= expected.high:
        return f"{label} is {seen!s:.50}, expected {expected.low:g} to {expected.high:g}"
    return None


def _tensor_difference(expected: torch.Tensor, seen: torch.Tensor, label: str) -> str | None:
    if expected.shape != seen.shape:
        return f"{label} has shape {tuple(seen.shape)}, expected {tuple(expected.shape)}"
    kinds = [(value.is_floating_point(), value.is_complex(), value.dtype == torch.bool) for value in (expected, seen)]
    if kinds[0] != kinds[1]:
        return f"{label} is of type {seen.dtype}, expected {expected.dtype}"
    return None
