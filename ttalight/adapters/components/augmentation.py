"""The augmentation of methods that compare an image with an altered one."""

from __future__ import annotations

from torch import Tensor

from ttalight.errors import InputError
from ttalight.transforms import RandomJitterAffineFlip

__all__ = ["check_one_prediction", "cotta_augmentation"]


def cotta_augmentation() -> RandomJitterAffineFlip:
    """Return the augmentation of CoTTA, which SANTA and RMT share; see ``RandomJitterAffineFlip``."""
    return RandomJitterAffineFlip(outside="border", blur=(0.001, 0.5), noise=0.005)


def check_one_prediction(method: str, logits: Tensor) -> None:
    """Check that a network predicts images, not pixels.

    Args:
        method: Name of the method.
        logits: (B, C).

    Raises:
        ValueError: If they have more dimensions.
    """
    if logits.ndim != 2:
        raise InputError(
            f"{method} compares predictions of shifted and turned images and takes one an image, (B, C); got logits of "
            f"shape {tuple(logits.shape)}: for dense outputs use a method without views"
        )
