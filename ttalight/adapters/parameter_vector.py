"""Many small parameters as one vector, so that an optimizer's step is a few operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["ParameterVector", "divide", "flatten"]

#: Numbers from which on the copies cost more than the operations that they save.
_MOST = 1 << 18
#: Options with which an optimizer makes its steps itself.
_ELSEWHERE = ("amsgrad", "capturable", "differentiable", "fused", "maximize")


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

    @staticmethod
    def steps_itself(optimizer: Optimizer) -> bool:
        """Return whether the few operations here do what the optimizer's own step would."""
        (group,) = optimizer.param_groups
        return not (any(group.get(name) for name in _ELSEWHERE) or isinstance(group["lr"], Tensor))

    @torch.no_grad()
    def step(self, optimizer: Optimizer, gradient: Tensor, when: Tensor | None = None) -> None:
        """Let the optimizer move the parameters.

        Args:
            optimizer: Of ``values``.
            gradient: Of all parameters, as ``flatten`` returns it.
            when: Boolean scalar, whether to step, which the host does not read; None says yes.
        """
        torch.cat(_as_vectors(self.parameters), out=self.values.data)
        state = optimizer.state[self.values]
        if when is None:
            if self.steps_itself(optimizer) and "step" in state:
                state["step"] = float(state["step"])  # a number: reading a tensor could wait for the device
            self._step(optimizer, gradient)
        else:
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float64, device=when.device)
            before = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
            values = self.values.detach().clone()
            self._step(optimizer, gradient)
            self.values.data.copy_(torch.where(when, self.values.data, values))
            for name, value in state.items():
                if value is not None:
                    state[name] = torch.where(when, value, before.get(name, 0.0))
        torch._foreach_copy_(self.parameters, self._parts)

    def _step(self, optimizer: Optimizer, gradient: Tensor) -> None:
        (group,) = optimizer.param_groups
        if not self.steps_itself(optimizer):
            self.values.grad = gradient
            optimizer.step()
            self.values.grad = None
        else:
            update = move_by_sgd if isinstance(optimizer, SGD) else move_by_adam
            update(self.values.data, gradient, group, optimizer.state[self.values])

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "values": self.values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._parts = divide(self.values.detach(), self.parameters)  # views of the copy, not copies of the views


def move_by_sgd(values: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Do what ``torch.optim.SGD`` does in a step, in the few operations that one vector takes.

    Args:
        values: (N,), moved in place.
        gradient: (N,).
        group: The optimizer's parameter group.
        state: The optimizer's state of the vector; empty before the first step.
    """
    if group["weight_decay"]:
        gradient = gradient.add(values, alpha=group["weight_decay"])
    momentum = group["momentum"]
    if momentum:
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = gradient.clone()
        else:
            state["momentum_buffer"].mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        buffer = state["momentum_buffer"]
        gradient = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
    values.add_(gradient, alpha=-group["lr"])


def move_by_adam(values: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Do what ``torch.optim.Adam`` and ``AdamW`` do in a step, in the few operations that one vector takes.

    D. Kingma, J. Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015, arXiv 1412.6980.

    Args:
        values: (N,), moved in place.
        gradient: (N,).
        group: The optimizer's parameter group.
        state: The optimizer's state of the vector; empty before the first step. Its ``step`` stays a scalar on the
            device if it is one.
    """
    if not state:
        state["step"] = 0.0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(values), torch.zeros_like(values)
    lr, decay, (first, second) = group["lr"], group["weight_decay"], group["betas"]
    state["step"] = steps = state["step"] + 1.0
    if decay and group["decoupled_weight_decay"]:
        values.mul_(1 - lr * decay)
    elif decay:
        gradient = gradient.add(values, alpha=decay)
    mean = state["exp_avg"].lerp_(gradient, 1 - first)
    square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    left, square_left = 1 - first**steps, 1 - second**steps
    if isinstance(steps, Tensor):
        root = square.sqrt().div_(square_left.sqrt()).add_(group["eps"])
        values.sub_((mean / root).mul_(lr / left))
    else:
        root = square.sqrt().div_(math.sqrt(square_left)).add_(group["eps"])
        values.addcdiv_(mean, root, value=-lr / left)


@torch.no_grad()
def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all numbers of tensors of one dtype on one device, one tensor after the other: (N,).

    Args:
        tensors: At least one, of any shapes.
    """
    return torch.cat(_as_vectors(tensors))


def _as_vectors(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor if tensor.ndim == 1 else tensor.flatten() for tensor in tensors]


def divide(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of what ``flatten`` returned, as views.

    Args:
        vector: (N,).
        like: Tensors of the parts' shapes.
    """
    parts = vector.split_with_sizes([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
