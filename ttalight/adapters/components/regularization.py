"""Weight averaging and regularisation towards the source weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttalight.models.vectors import divide, flatten

__all__ = ["ema_update_", "ewc_penalty_and_gradient", "restore_at_random_"]


@torch.no_grad()
def ema_update_(weights: Sequence[Tensor], targets: Sequence[Tensor], share: float) -> None:
    """Move weights, in place, by a share of the way to their targets: an exponential moving average.

    Args:
        weights: Tensors to change.
        targets: As many of the same shapes.
        share: In [0, 1].
    """
    torch._foreach_lerp_(list(weights), list(targets), share)


@torch.no_grad()
def restore_at_random_(
    weights: Sequence[Tensor], source: Sequence[Tensor], probability: float, generator: torch.Generator
) -> None:
    """Restore each number among weights, in place, to its source value with a probability.

    Q. Wang, O. Fink, L. Van Gool, D. Dai, *Continual Test-Time Domain Adaptation*, CVPR 2022, arXiv 2203.13591.

    Args:
        weights: Tensors to change, on one device.
        source: As many of the same shapes.
        probability: In [0, 1].
        generator: Of the device of the weights. One draw is made for all of them.
    """
    count = sum(weight.numel() for weight in weights)
    chosen = torch.rand(count, generator=generator, device=generator.device) < probability
    for weight, value, mask in zip(weights, source, divide(chosen, weights), strict=True):
        weight.copy_(torch.where(mask, value, weight))


@torch.no_grad()
def ewc_penalty_and_gradient(
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
