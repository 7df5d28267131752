"""Random numbers of the corruptions: on the CPU and in a fixed type, whatever the device and torch's defaults are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def normal(shape: Sequence[int], generator: Generator) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform(
    shape: Sequence[int], low: float, high: float, generator: Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers in [low, high)."""
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu").mul_(high - low).add_(low)


def integers(shape: Sequence[int], low: int, high: int, generator: Generator) -> Tensor:
    """Integers in low, ..., high - 1, int64."""
    return torch.randint(low, high, tuple(shape), generator=generator, dtype=torch.int64, device="cpu")
