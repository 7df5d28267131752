"""The image tower of a vision-language model as an ordinary encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["ImageTower"]


class ImageTower(nn.Module):
    """Maps images to features by a model's ``encode_image``, or by its forward where it has none.

    Args:
        model: For example a model of open_clip, or its ``visual``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (B, D), of normalised images, (B, 3, H, W)."""
        encode: Any = getattr(self.model, "encode_image", self.model)
        features: Tensor = encode(images)
        return features
