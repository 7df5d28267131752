"""Normalisation of images as the first layer of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttalight.errors import InputError, InputTypeError

__all__ = ["Normalize"]


class Normalize(nn.Module):
    """Subtract a mean from every colour channel and divide by a standard deviation.

    The values are buffers, so they travel with the weights of the network whose first layer this is.

    Args:
        mean: Three numbers for R, G and B on the scale of images in [0, 1]; None is 0.
        std: Three positive numbers; None is 1.

    Raises:
        ValueError: If there are not three values, one is not finite, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        self.set((0.0, 0.0, 0.0) if mean is None else mean, (1.0, 1.0, 1.0) if std is None else std)

    def set(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Overwrite the values in place.

        Raises:
            ValueError: If there are not three values, one is not finite, or a standard deviation is not positive.
        """
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise InputError(f"{name} must be three finite numbers (R, G, B), got {values}")
        if min(std) <= 0:
            raise InputError(f"std must be positive, got {std}")
        with torch.no_grad():
            self.mean.copy_(torch.as_tensor(mean))
            self.std.copy_(torch.as_tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: (B, 3, H, W), floating point, RGB in [0, 1].

        Returns:
            (B, 3, H, W).

        Raises:
            TypeError: If the images are integers.
        """
        if not images.is_floating_point():
            raise InputTypeError(
                f"expected floating-point images in [0, 1], got {images.dtype}: divide bytes by 255 first"
            )
        return (images - self.mean[:, None, None]) / self.std[:, None, None]
