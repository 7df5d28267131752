"""Checks of images and constructor arguments that every transform shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttalight.errors import InputError, InputTypeError


def check_images(images: Tensor) -> None:
    """Refuse whatever is not a float batch of RGB images.

    Only the type and the shape are looked at: reading values would make the host wait for the device.

    Args:
        images: What was passed as (B, 3, H, W) float images in [0, 1].

    Raises:
        TypeError: If it is not a floating point tensor.
        ValueError: If it is not (B, 3, H, W) with H, W >= 1.
    """
    if not isinstance(images, Tensor):
        raise InputTypeError(
            f"images must be a float tensor (B, 3, H, W); got {type(images).__name__}: convert it first"
        )
    if not images.is_floating_point():
        advice = "use images.float() / 255" if images.dtype == torch.uint8 else "convert them to float RGB in [0, 1]"
        raise InputTypeError(f"images must be floating point RGB in [0, 1]; got {images.dtype}: {advice}")
    shape = tuple(images.shape)
    if images.ndim != 4:
        advice = "add the batch dimension with images[None]" if images.ndim == 3 else "pass one batch of RGB images"
        raise InputError(f"images must be (B, 3, H, W); got shape {shape}: {advice}")
    if shape[1] != 3:
        advice = "repeat the grey channel with images.expand(-1, 3, -1, -1)" if shape[1] == 1 else "pass RGB images"
        raise InputError(f"images must be (B, 3, H, W); got shape {shape} with {shape[1]} channels: {advice}")
    if shape[2] < 1 or shape[3] < 1:
        raise InputError(f"images must be (B, 3, H, W) with H, W >= 1; got shape {shape}: pass images with pixels")


def check_rows(name: str, parameters: Tensor, rows: int, columns: tuple[int, ...] = ()) -> None:
    """Refuse parameters whose shape is not (rows, *columns).

    Raises:
        ValueError: If the shape differs.
    """
    expected = (rows, *columns)
    if tuple(parameters.shape) != expected:
        raise InputError(f"{name} must be {expected}, one row an image; got shape {tuple(parameters.shape)}")


def probability(name: str, value: float) -> float:
    """Return a probability as float.

    Raises:
        ValueError: If it is outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{name} must be a probability in [0, 1]; got {value}")
    return float(value)


def numbers(value: object) -> tuple[float, ...]:
    """Return a sequence of numbers as a tuple of floats; empty if it is anything else."""
    try:
        return tuple(float(number) for number in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return ()


def positive_range(name: str, value: Sequence[float], upper: float = float("inf")) -> tuple[float, float]:
    """Return an increasing pair 0 < low <= high <= upper as a tuple of floats.

    Raises:
        ValueError: If it is not such a pair.
    """
    pair = numbers(value)
    bound = "" if upper == float("inf") else f" <= {upper:g}"
    if len(pair) != 2 or not 0.0 < pair[0] <= pair[1] <= upper or pair[1] == float("inf"):
        raise InputError(f"{name} must be two finite numbers with 0 < low <= high{bound}; got {value}")
    return pair[0], pair[1]


def whole_number(name: str, value: int, lowest: int) -> int:
    """Return an integer that is at least ``lowest``.

    Raises:
        ValueError: If it is smaller or not whole.
    """
    if isinstance(value, bool) or int(value) != value or value < lowest:
        raise InputError(f"{name} must be a whole number >= {lowest}; got {value}")
    return int(value)
