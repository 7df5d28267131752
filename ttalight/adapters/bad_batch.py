"""Batches that a network cannot take as they are, and what is predicted from instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OnBadBatch", "check_batch_type", "refusal", "repaired"]

#: What an adapter does with a batch that the network cannot take: ``error`` stops, ``skip`` predicts with the model as
#: it is and does not adapt, ``source`` predicts with the source model and does not adapt.
OnBadBatch = Literal["error", "skip", "source"]


def check_batch_type(images: Tensor) -> TypeError | None:
    """Return what is wrong with the type of a batch; None if it is floating point.

    Raises:
        TypeError: If it is neither floating point nor uint8: nothing sensible could be predicted.
        ValueError: If there is no image in it.
    """
    if len(images) == 0 or images.numel() == 0:
        raise ValueError(f"a batch of shape {tuple(images.shape)} has no pixels: leave it out of the stream")
    if images.is_floating_point():
        return None
    fault = TypeError(
        f"images must be floating point, as the network expects them; got {images.dtype}: "
        + ("use images.float() / 255" if images.dtype == torch.uint8 else "convert them first")
    )
    if images.dtype != torch.uint8:
        raise fault
    return fault


def refusal(forward: Callable[[Tensor], object], images: Tensor, usual: tuple[int, ...]) -> ValueError | None:
    """Return why a network cannot take images of another size than usual; None if it can.

    Args:
        forward: The network's forward; it is tried on one image.
        images: (B, C, H, W).
        usual: (C, H, W) of the batches before.
    """
    try:
        with torch.no_grad():
            forward(images[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        fault = ValueError(
            f"images of shape {tuple(images.shape[1:])} came after those of {usual}, and the network does not take "
            f"them ({reason}): scale all images of the stream to one size"
        )
        fault.__cause__ = error
        return fault
    return None


def repaired(images: Tensor, dtype: torch.dtype, size: tuple[int, ...] | None = None) -> Tensor:
    """Return images that a prediction can be made from.

    Bytes become floats in [0, 1], pixels that are not finite become 0, and images are scaled to ``size``.

    Args:
        images: (B, C, H, W), floating point or uint8.
        dtype: Floating-point type that bytes become.
        size: (H, W) that the network takes; the images' own by default.
    """
    if not images.is_floating_point():
        images = images.to(dtype).div(255)
    images = images.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if size is None:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
