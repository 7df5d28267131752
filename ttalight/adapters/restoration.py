"""Ways back towards the source weights, and penalties on the way from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["drift_penalty", "move_towards", "restore_at_random"]


@torch.no_grad()
def move_towards(weights: Sequence[Tensor], targets: Sequence[Tensor], share: float) -> None:
    """Move weights, in place, by a share of the way to their targets: an exponential moving average.

    Args:
        weights: Tensors to change.
        targets: As many of the same shapes.
        share: In [0, 1].
    """
    torch._foreach_lerp_(list(weights), list(targets), share)


@torch.no_grad()
def restore_at_random(
    weights: Sequence[Tensor], source: Sequence[Tensor], probability: float, generator: torch.Generator
) -> None:
    """Set each single weight back to the source, in place, with a probability.

    Q. Wang, O. Fink, L. Van Gool, D. Dai, *Continual Test-Time Domain Adaptation*, CVPR 2022, arXiv 2203.13591.

    Args:
        weights: Tensors to change.
        source: As many of the same shapes.
        probability: In [0, 1].
        generator: On the weights' device.
    """
    for weight, original in zip(weights, source, strict=True):
        chosen = torch.rand(weight.shape, generator=generator, device=weight.device) < probability
        weight.copy_(torch.where(chosen, original, weight))


def drift_penalty(
    weights: Sequence[Tensor], source: Sequence[Tensor], importance: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the squared distance to the source weights, each weight's share multiplied by its importance: a scalar.

    With the diagonal of the Fisher information as importance this is the penalty of J. Kirkpatrick et al., *Overcoming
    catastrophic forgetting in neural networks*, PNAS 2017, arXiv 1612.00796, without the factor 1/2.

    Args:
        weights: The weights; gradients flow to them.
        source: As many tensors of the same shapes.
        importance: As many again; 1 by default.
    """
    # One tensor for each: a network has dozens of small ones, and what costs is their number.
    moved = _concatenated(weights) - _concatenated(source)
    squares = moved.square()
    return (squares if importance is None else squares * _concatenated(importance)).sum()


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
