"""Many tensors as one vector, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["divide", "flatten"]


@torch.no_grad()
def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all numbers of tensors of one dtype on one device, one tensor after the other: (N,).

    Args:
        tensors: At least one, of any shapes.
    """
    return torch.cat([tensor if tensor.ndim == 1 else tensor.flatten() for tensor in tensors])


def divide(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of what ``flatten`` returned, as views.

    Args:
        vector: (N,).
        like: Tensors of the parts' shapes.
    """
    parts = vector.split_with_sizes([tensor.numel() for tensor in like])
    return [part if tensor.ndim == 1 else part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
