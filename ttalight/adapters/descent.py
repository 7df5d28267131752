"""The optimizer of the free parameters, which moves them as one vector where that takes less time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ttalight.adapters.parameter_vector import ParameterVector, divide

__all__ = ["Descent"]


class Descent:
    """Moves parameters by a gradient that is one vector.

    Args:
        make: Makes the optimizer of given parameters.
        parameters: What moves.
    """

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer], parameters: Sequence[nn.Parameter]) -> None:
        self._make = make
        self.parameters = list(parameters)
        self.optimizer = make(self.parameters)
        self._vector: ParameterVector | None = None
        self._fresh = [_options(group) for group in self.optimizer.param_groups]

    def move(self, gradient: Tensor, as_it_was: bool, when: Tensor | None = None, must: bool = False) -> None:
        """Let the optimizer step.

        Args:
            gradient: Of all parameters, as ``flatten`` returns it.
            as_it_was: Whether the same is left at the parameters themselves.
            when: Boolean scalar that the host is not to read: whether to step. None says yes.
            must: Whether an optimizer that cannot do without the host there is an error; it steps otherwise.

        Raises:
            ValueError: If it is one.
        """
        if self._vector is None and not self.optimizer.state and all(p.grad is not None for p in self.parameters):
            if ParameterVector.fits(self.optimizer, self.parameters):
                self._make_anew(as_vector=True)
        if when is not None and not (self._vector is not None and self._vector.steps_itself(self.optimizer)):
            when = None
            if must:
                raise ValueError(
                    "a step that depends on numbers which the host does not read needs SGD, Adam or AdamW in their "
                    "plain forms and at most 262,144 adapted numbers: adapt normalisation layers only, or leave "
                    "guard_every at 1"
                )
        if self._vector is not None:
            self._vector.step(self.optimizer, gradient, when)
            return
        if not as_it_was:
            for parameter, part in zip(self.parameters, divide(gradient, self.parameters), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part)
        self.optimizer.step()

    def _make_anew(self, as_vector: bool) -> None:
        """Make the optimizer anew, of the parameters one by one or as a vector; what was set is kept."""
        self._vector = ParameterVector(self.parameters) if as_vector else None
        made = self._make([self._vector.values] if self._vector else self.parameters)
        for group, earlier in zip(made.param_groups, self.optimizer.param_groups, strict=False):
            group.update(_options(earlier))
        if as_vector and made.defaults.get("foreach"):
            made.param_groups[0]["foreach"] = False  # which takes longer for a single tensor
        self.optimizer = made

    def reset(self) -> None:
        """Forget all steps, and what was set since."""
        self.optimizer.state.clear()
        for group, fresh in zip(self.optimizer.param_groups, self._fresh, strict=True):
            group.update(fresh)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state, which itself hands out, and takes in, its own tensors."""
        return copy.deepcopy(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, of one vector or of parameters one by one."""
        one = sum(len(group["params"]) for group in state["param_groups"]) == 1
        as_vector = one and len(self.parameters) > 1
        if as_vector != (self._vector is not None):
            self._make_anew(as_vector)
        self.optimizer.load_state_dict(copy.deepcopy(state))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return what is set in a parameter group of an optimizer, but for how it goes about its work."""
    return {name: value for name, value in group.items() if name not in ("params", "foreach")}
