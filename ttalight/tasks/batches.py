"""Checks of what a data module delivers, before a network learns or answers nonsense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttalight.errors import InputError, InputTypeError
from ttalight.labels import UNLABELLED
from ttalight.transforms.checks import check_images

__all__ = ["check_batch", "check_values"]

#: How far pixels may lie outside [0, 1]: resampling overshoots a little, normalised or 8-bit images do by far.
_OVERSHOOT = 0.5


def check_batch(
    batch: Any,
    dtypes: tuple[torch.dtype, ...],
    num_classes: int | None,
    adapted: bool = False,
    ignore_index: int | None = None,
) -> None:
    """Refuse a batch that is not (images, labels, ...) as a task expects it; reads values once.

    Args:
        batch: What the data module delivered, on the device: images (B, 3, H, W), RGB in [0, 1], then labels (B,), if
            there are any, in 0 to num_classes - 1, or all of them ``UNLABELLED``. Labels of pixels are (B, H, W).
        dtypes: Floating-point types that the network takes.
        num_classes: Number of classes; None where labels are not read.
        adapted: Whether an adapter gets the images: it looks for bytes and for pixels that are not finite in every
            batch, and decides what becomes of them.
        ignore_index: Label of pixels that do not count.

    Raises:
        TypeError: If the batch is no such sequence, or the images are of another type.
        ValueError: If shape, channels or range of the images, or the labels, are not as above.
    """
    if not isinstance(batch, (tuple, list)) or not batch or not isinstance(batch[0], Tensor):
        raise InputTypeError(
            f"expected batches (images, labels), got a {type(batch).__name__}: let the data module's loaders yield "
            "such pairs"
        )
    images = batch[0]
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        raise InputError(
            f"images must be (B, 3, H, W), got shape {tuple(images.shape)}: move the channels by permute(0, 3, 1, 2)"
        )
    judged_later = adapted and images.dtype == torch.uint8
    check_images(images.to(dtypes[0]) if judged_later else images)
    if images.dtype not in dtypes and not judged_later:
        raise InputTypeError(
            f"images are {images.dtype}, the network takes {' or '.join(map(str, dtypes))}: convert them in the data "
            "module, for example by images.float()"
        )
    check_values(batch, num_classes, pixels=not adapted, unlabelled=True, ignore_index=ignore_index)
    if judged_later:
        return
    finite = images.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (float(value) for value in finite.aminmax())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        advice = "divide them by 255" if high > 10 else "leave normalisation to the task (mean, std), its first layer"
        raise InputError(f"images must be RGB in [0, 1], got values from {low:.4g} to {high:.4g}: {advice}")


def check_values(
    batch: Any,
    num_classes: int | None,
    pixels: bool = True,
    unlabelled: bool = False,
    ignore_index: int | None = None,
) -> None:
    """Refuse NaN and infinite pixels, and labels beyond the classes.

    Args:
        batch: A sequence that begins with images and labels; anything else passes.
        num_classes: Number of classes; None where labels are not read.
        pixels: Whether pixels are looked at.
        unlabelled: Whether no image may have a label: all are ``UNLABELLED`` then.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: If there are any; the message says how many.
    """
    if not isinstance(batch, (tuple, list)) or not batch:
        return
    images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if pixels and isinstance(images, Tensor) and images.is_floating_point():
        bad = len(images) - int(images.isfinite().flatten(1).all(1).sum())
        if bad:
            raise InputError(f"{bad} of {len(images)} images have NaN or infinite pixels: repair them or remove them")
    if num_classes is None or not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    if labels.ndim not in (1, 3):  # of images, or of pixels
        return
    if ignore_index is not None:
        labels = labels.where(labels != ignore_index, 0)
    low, high = (int(value) for value in labels.aminmax())
    if unlabelled and low == high == UNLABELLED:
        return
    if low < 0 or high >= num_classes:
        raise InputError(
            f"labels must be from 0 to {num_classes - 1}, got {low} to {high}: correct them, or set num_classes to "
            "the number of classes of the data"
        )
