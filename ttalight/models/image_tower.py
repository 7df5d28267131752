"""The image tower of a vision-language model as an ordinary encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ttalight.errors import InputTypeError

__all__ = ["ImageTower", "pooled"]


class ImageTower(nn.Module):
    """Maps images to features by a model's ``encode_image`` or ``get_image_features``, or by its forward without them.

    Args:
        model: For example a model of open_clip, its ``visual``, or a CLIP or SigLIP model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (B, D), of normalised images, (B, 3, H, W)."""
        names = ("encode_image", "get_image_features")
        encode: Any = next((getattr(self.model, name) for name in names if hasattr(self.model, name)), self.model)
        return pooled(encode(images))


def pooled(output: Any) -> Tensor:
    """Return the features in what a tower returns: a tensor, or an output of transformers with ``pooler_output``.

    Raises:
        TypeError: If it is neither.
    """
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(features, Tensor):
        raise InputTypeError(
            f"expected a tensor of features from the tower, or an output with pooler_output, got "
            f"{type(output).__name__}: give a module that returns features alone"
        )
    return features
