"""Pixels behind the images that a network is given: methods that make views or perturb images work on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.models import Normalize
from ttalight.models.network import Network

__all__ = ["PixelSpace", "check_normalization", "pixel_space"]


class PixelSpace(NamedTuple):
    """The way from a network's images to pixels in [0, 1] and back; None where the images are pixels already.

    Args:
        mean: Channel means that were subtracted, (3, 1, 1).
        std: Standard deviations that were divided by, (3, 1, 1).
    """

    mean: Tensor | None = None
    std: Tensor | None = None

    def to_pixels(self, images: Tensor) -> Tensor:
        """Return pixels, (B, 3, H, W), of images as the network expects them."""
        if self.mean is None or self.std is None:
            return images
        return (images * self.std + self.mean).to(images.dtype)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return images as the network expects them, (B, 3, H, W); gradients flow back to the pixels."""
        if self.mean is None or self.std is None:
            return pixels
        return ((pixels - self.mean) / self.std).to(pixels.dtype)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about the pixels."""
        values = {"mean": self.mean, "std": self.std}
        return {name: None if value is None else value.flatten().tolist() for name, value in values.items()}


def check_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse a mean and standard deviation that do not describe a normalisation.

    Raises:
        ValueError: If only one of them is given, they are not three numbers each, or one is out of range.
    """
    if (mean is None) != (std is None):
        raise InputError(f"give mean and std together, got mean={mean} and std={std}")
    Normalize(mean, std)


def pixel_space(net: Network, mean: Sequence[float] | None, std: Sequence[float] | None) -> PixelSpace:
    """Return the pixel space of a network.

    Tasks of this package, and modules in general, are taken to expect pixels in [0, 1]. A network of timm itself, not
    one inside another module, says in its ``pretrained_cfg`` how its images are normalised.

    Args:
        net: The network.
        mean: Channel means of a normalisation outside the network; by default see above.
        std: Channel standard deviations of it.
    """
    if mean is None or std is None:
        config: Any = getattr(net.module, "pretrained_cfg", None) or {}
        mean, std = config.get("mean"), config.get("std")
    if mean is None or std is None:
        return PixelSpace()
    parameter = next(net.module.parameters())
    precision = torch.promote_types(parameter.dtype, torch.float32)
    both = torch.tensor((tuple(mean), tuple(std)), dtype=precision).to(parameter.device)[..., None, None]
    return PixelSpace(both[0], both[1])
