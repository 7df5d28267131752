"""Picture files of any depth as 8-bit RGB."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from ttalight.errors import InputError

__all__ = ["FORMATS", "read_picture"]

#: Formats that are read. Of the formats that Pillow knows beside these, some start programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF 6.0
_SLACK = 1e-4  # of float pictures beyond their range


class _UnknownRange(Exception):
    """A picture's values cannot be scaled to 8 bits."""


def read_picture(
    path: Path, formats: tuple[str, ...] = FORMATS, advice: str = "replace or remove the file"
) -> Image.Image:
    """Read a picture as 8-bit RGB.

    Grey levels of 12 and 16 bits are scaled to 8 bits, float ones from [0, 1]. Pillow itself clips them at 255, so that
    a 16-bit picture would become white. Of 16-bit colours Pillow keeps the upper 8 bits.

    Args:
        path: The file.
        formats: Pillow's names of the formats that are allowed.
        advice: Ends the message of an error.

    Raises:
        ValueError: If the file cannot be read, or its values have no known range. The message names the file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise OSError("not a plain file")
        with Image.open(path, formats=formats) as file:
            return _eight_bits(file).convert("RGB")
    except _UnknownRange as error:
        raise InputError(f"cannot read image {path}: {error}; convert it to 8 bits") from None
    except Exception as error:  # exceptions of decoders have no common base class
        raise InputError(f"cannot read image {path} ({type(error).__name__}: {error}): {advice}") from error


def _eight_bits(file: Image.Image) -> Image.Image:
    """Return the picture, with more than 8 bits of grey scaled to 8."""
    if file.mode != "F" and not file.mode.startswith("I"):
        return file
    tags = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
    highest = 1.0 if file.mode == "F" else float(2 ** _bits(file.mode, tags) - 1)
    values: npt.NDArray[np.float64] = np.asarray(file).astype(np.float64)
    if not (values.min() >= -_SLACK and values.max() <= highest + _SLACK):  # not finite ones included
        kind = "float" if file.mode == "F" else "integer"
        seen = f"{values.min():g} to {values.max():g}"
        raise _UnknownRange(f"it has {kind} values from {seen}, expected 0 to {highest:g}")
    if tags.get(_PHOTOMETRIC) == 0:  # zero is white
        values = highest - values
    return Image.fromarray((values.clip(0, highest) * (255 / highest)).round().astype(np.uint8))


def _bits(mode: str, tags: object) -> int:
    """Return the number of bits of an integer picture: 16, but for TIFF as its tags say."""
    if not tags:
        return 16  # PNG and PPM have no others
    assert isinstance(tags, TiffImagePlugin.ImageFileDirectory_v2)
    bits = int(np.ravel(tags.get(_BITS, 16))[0])
    if mode == "I" or bits not in (12, 16):  # signed, or of 32 bits
        raise _UnknownRange("it has signed or 32-bit integers, whose range is not known")
    return bits
