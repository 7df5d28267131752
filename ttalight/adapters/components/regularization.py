"""Ways back towards the source weights, and penalties on the way from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttalight.adapters.parameter_vector import flatten

__all__ = ["drift", "move_towards", "restore_at_random"]


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


@torch.no_grad()
def drift(
    weights: Sequence[Tensor], source: Tensor, strength: float, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a penalty on the distance to the source weights, one vector for all, and the penalty.

    The penalty is ``strength`` times the sum of squared differences, each multiplied by its importance. With the
    diagonal of the Fisher information as importance it is that of J. Kirkpatrick et al., *Overcoming catastrophic
    forgetting in neural networks*, PNAS 2017, arXiv 1612.00796, without the factor 1/2. Its gradient has a closed form:
    no pass backwards through dozens of small tensors is needed.

    Args:
        weights: The weights.
        source: Values of all numbers in the source model, as ``flatten`` returns them.
        strength: Of the penalty.
        importance: Of all numbers, as ``flatten`` returns it, none below 0; 1 by default.
    """
    moved = flatten(weights) - source
    pulled = moved if importance is None else moved * importance
    return 2 * strength * pulled, strength * torch.dot(moved, pulled)
