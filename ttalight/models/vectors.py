"""Many tensors as one vector, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.errors import UsageError

__all__ = ["JoinedParameters", "can_join", "divide", "flatten", "gradient_vector", "other_values"]


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


@contextmanager
def other_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Let tensors have other values temporarily.

    Args:
        tensors: Parameters or buffers.
        values: One for each, of the same shape; used as they are, not copied.
    """
    own = [tensor.data for tensor in tensors]
    try:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data = value
        yield
    finally:
        for tensor, value in zip(tensors, own, strict=True):
            tensor.data = value


class JoinedParameters:
    """Parameters that share the memory of one vector temporarily: what moves the vector moves them all, in one go.

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
        #: Numbers of each parameter, and where they are in memory.
        self.sizes = [own.numel() for own in self._own]
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
            raise UsageError(
                "the network was moved or converted while it adapts: use to() of what wrap() returned to move it, and "
                "release() before it is converted"
            )
        self.vector.data.copy_(flatten(self._parameters))
        self._join()

    def separate(self) -> None:
        """Give the parameters their own memory back, with the values that it had."""
        for parameter, own in zip(self._parameters, self._own, strict=True):
            parameter.data = own

    def divide_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the ``state_dict()`` of an optimizer of the vector as that of an optimizer of the parameters."""
        numbers, entries = list(range(len(self._own))), state["state"].get(0)
        divided = {name: self._divided(value) for name, value in (entries or {}).items()}
        parts = {number: {name: values[number] for name, values in divided.items()} for number in numbers}
        groups = [group | {"params": numbers} for group in state["param_groups"]]
        return {"state": {} if entries is None else parts, "param_groups": groups}

    def _divided(self, value: Any) -> list[Any]:
        if not isinstance(value, Tensor):
            return [value] * len(self._own)
        return [part.clone() for part in (divide(value, self._own) if value.ndim == 1 else [value] * len(self._own))]

    def join_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return what ``divide_state`` was made from. Counts of steps that differ become the largest of them."""
        entries = [state["state"].get(number, {}) for number in range(len(self._own))]
        names = {name: None for own in entries for name in own}
        joined = {name: self._whole([own.get(name) for own in entries]) for name in names}
        groups = [group | {"params": [0]} for group in state["param_groups"]]
        return {"state": {0: joined} if joined else {}, "param_groups": groups}

    def _whole(self, values: list[Any]) -> Any:
        known = [value for value in values if value is not None]
        if not known or not isinstance(known[0], Tensor) or known[0].ndim == 0:
            return max(known, default=None)
        pairs = zip(values, self._own, strict=True)
        return flatten([known[0].new_zeros(own.shape) if value is None else value for value, own in pairs])


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
