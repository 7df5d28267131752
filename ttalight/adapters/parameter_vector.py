"""Many small parameters as one vector, so that an optimizer's step is a few operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["ParameterVector", "divide", "flatten"]

#: Numbers from which on the copies cost more than the operations that they save.
_MOST = 1 << 18


class ParameterVector:
    """Stands in for parameters before an optimizer that treats every number alike.

    The affines of normalisation layers are dozens of tensors of a few numbers each: an optimizer spends its time on
    calls. The parameters themselves stay where they are, and may be moved by others between two steps. One that a pass
    did not reach has a gradient of zero here, where torch's optimizers leave it out: momentum still moves it.

    Args:
        parameters: Of one dtype, on one device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters: list[Tensor] = list(parameters)
        #: What the optimizer is given.
        self.values = nn.Parameter(flatten(self.parameters))
        self._parts = divide(self.values.detach(), self.parameters)

    @staticmethod
    def fits(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether the optimizer's steps are the same on one vector, and take less time.

        Args:
            optimizer: Of these parameters.
            parameters: Those that are to move.
        """
        if type(optimizer) not in (SGD, Adam, AdamW) or len(optimizer.param_groups) != 1:
            return False
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        size = sum(parameter.numel() for parameter in parameters)
        return len(parameters) > 1 and len(kinds) == 1 and size <= _MOST

    @torch.no_grad()
    def step(self, optimizer: Optimizer, gradient: Tensor) -> None:
        """Let the optimizer move the parameters.

        Args:
            optimizer: Of ``values``.
            gradient: Of all parameters, as ``flatten`` returns it.
        """
        torch.cat([parameter.flatten() for parameter in self.parameters], out=self.values.data)
        self.values.grad = gradient
        optimizer.step()
        self.values.grad = None
        torch._foreach_copy_(self.parameters, self._parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "values": self.values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._parts = divide(self.values.detach(), self.parameters)  # views of the copy, not copies of the views


@torch.no_grad()
def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all numbers of tensors of one dtype on one device, one tensor after the other: (N,).

    Args:
        tensors: At least one, of any shapes.
    """
    return torch.cat([tensor.flatten() for tensor in tensors])


def divide(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of what ``flatten`` returned, as views.

    Args:
        vector: (N,).
        like: Tensors of the parts' shapes.
    """
    parts = vector.split_with_sizes([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
