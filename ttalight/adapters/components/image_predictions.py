"""The check of methods that need one prediction an image."""

from __future__ import annotations

from torch import Tensor

from ttalight.errors import InputError

__all__ = ["check_image_predictions"]


def check_image_predictions(logits: Tensor, method: str, does: str, without: str = "views") -> None:
    """Check that a network predicts images, not pixels.

    Args:
        logits: Of a batch, (B, C).
        method: Name of the method.
        does: What the method does with predictions.
        without: What a method for dense outputs does not have.

    Raises:
        ValueError: If they have more dimensions.
    """
    if logits.ndim != 2:
        raise InputError(
            f"{method} {does} and takes one prediction an image, (B, C); got logits of shape {tuple(logits.shape)}: "
            f"for dense outputs use a method without {without}"
        )
