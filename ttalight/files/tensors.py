"""Safe reading of what ``torch.save`` wrote."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from ttalight.errors import InputError
from ttalight.files.untrusted import check_archive

__all__ = ["load_tensors"]

_BLOCK = 1 << 20
#: So many times as large as their storages the tensors of a file may be: weights are shared by some layers.
_MOST_SHARED = 16


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
