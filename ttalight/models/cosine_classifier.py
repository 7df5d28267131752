"""A linear classifier of unit vectors, as vision-language models have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CosineClassifier"]


class CosineClassifier(nn.Linear):
    """Multiplies unit vectors with unit rows, one for each class, and with a scale.

    Methods find it like any linear layer: ``net.head`` has its rows and its scale.

    Args:
        in_features: Dimension D.
        out_features: Number of classes C.
        scale: Factor on the cosines, the inverse of a temperature.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 100.0) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, (B, C), of unit vectors, (B, D)."""
        return self.scale * F.linear(features, self.weight)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale:g}"
