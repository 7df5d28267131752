"""Parts of losses over cosine similarities: checks, unit vectors in full precision, candidates of all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttalight.distributed import gather_with_gradients, rank_and_world_size
from ttalight.errors import InputError

__all__ = ["check_temperature", "check_vectors", "gather_candidates", "unit_vectors"]

EPS = 1e-12


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is a positive finite number."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature must be positive and finite (CTA uses 0.01 and 0.5), got {temperature}")


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors of length one in float32 (float64 stays float64).

    Vectors shorter than 1e-12 have no direction: they become zero, with similarity 0 to everything and no gradient (the
    gradient of a clamped norm would be 1e12 times the loss's).

    Args:
        vectors: (B, D) of any floating type.

    Returns:
        (B, D).
    """
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(norm > EPS, vectors / norm.clamp_min(EPS), torch.zeros_like(vectors))


def gather_candidates(*groups: Tensor, gather: bool) -> tuple[Tensor, int]:
    """Stack groups of B vectors into the candidates that anchors are compared with.

    Args:
        groups: k tensors (B, D).
        gather: Take the vectors of all ranks (N = ranks * B), with gradients, and not this rank's alone (N = B).

    Returns:
        (k * N, D), one group after the other, and the row within a group at which this rank's vectors start.

    Raises:
        ValueError: If N is 1, so that an anchor would have nothing to be told apart from.
    """
    rank, ranks = rank_and_world_size() if gather else (0, 1)
    size, width = groups[0].shape
    if size * ranks < 2:
        raise InputError(
            f"contrast needs at least 2 images in a batch, got {size}: use a batch size of 2 or more, "
            "and drop_last=True if the last batch can be smaller"
        )
    stacked = torch.stack(groups)
    if ranks > 1:
        stacked = gather_with_gradients(stacked).view(ranks, len(groups), size, width).transpose(0, 1)
    return stacked.reshape(-1, width), rank * size


def check_vectors(**named: Tensor) -> None:
    """Raise ValueError unless all tensors are (B, D) of one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(f"expected vectors of one shape (batch, dimension), got {seen}: pool or flatten maps first")
