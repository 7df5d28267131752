"""Many tensors as one vector, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["JoinedParameters", "can_join", "divide", "flatten", "gradient_vector"]


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


def gradient_vector(parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradients of parameters as one vector, (N,); that of a parameter without one is zero."""
    return flatten([torch.zeros_like(value) if value.grad is None else value.grad for value in parameters])


class JoinedParameters:
    """Parameters that share the memory of one vector for a while: what moves the vector moves them all, in one go.

    They stay the same objects. Until ``separate`` each is a view of the vector. Then it has its own memory back, with
    the values that it had before.

    Args:
        parameters: Parameters for which ``can_join`` holds.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._own = [parameter.data for parameter in parameters]
        #: The vector, (N,), as the one parameter that an optimizer moves.
        self.vector = nn.Parameter(flatten(self._own))
        self._parts = divide(self.vector.data, self._own)
        #: Where the values of each parameter are in memory.
        self.addresses = [part.data_ptr() for part in self._parts]
        self._join()

    def _join(self) -> None:
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            parameter.data = part

    def refresh(self) -> None:
        """Take over the values of parameters whose memory is another one by now.

        Raises:
            RuntimeError: If they are on another device, or of another type.
        """
        if list(map(Tensor.data_ptr, self._parameters)) == self.addresses:
            return
        kinds = {(parameter.dtype, parameter.device) for parameter in self._parameters}
        if kinds != {(self.vector.dtype, self.vector.device)}:
            raise RuntimeError(
                "the network was moved or converted while it adapts: use to() of what wrap() returned to move it, and "
                "release() before it is converted"
            )
        self.vector.data.copy_(flatten(self._parameters))
        self._join()

    def separate(self) -> None:
        """Give the parameters their own memory back, with the values that it had."""
        for parameter, own in zip(self._parameters, self._own, strict=True):
            parameter.data = own


def can_join(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether parameters can be ``JoinedParameters``: vectors of one type on one device, and finite.

    Matrices and kernels stay in memory that is laid out as their layers want it.
    """
    return (
        len({id(parameter) for parameter in parameters}) == len(parameters)
        and len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
        and all(type(parameter) is nn.Parameter and parameter.ndim == 1 for parameter in parameters)
        and bool(flatten(parameters).isfinite().all())
    )
