"""Forwards that stand in for those of instances, whose class stays what it is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.errors import InputTypeError
from ttalight.models.attaching.call import Call, split_call

__all__ = ["StandIn", "StepForward"]


class StandIn:
    """A forward that an instance carries until ``end``. Copies and pickles of the instance have its own one.

    Args:
        module: The module, whose class stays what it is.
        forward: Takes what the module's own forward takes.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward
        self._carried: Callable[..., Any] | None = vars(module).get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward."""
        return self.forward(*args, **kwargs)

    def end(self) -> None:
        """Restore the module's own forward."""
        if self._carried is None:
            vars(self.module).pop("forward", None)
        else:
            self.module.forward = self._carried

    def __reduce__(self) -> tuple[Any, ...]:
        # In functions that files can be read with where this package is not. A module that is being made has the
        # forward of its class.
        if self._carried is None:
            return getattr, (self.module, "forward")
        return operator.getitem, ((self._carried,), 0)


class StepForward(StandIn):
    """The forward of a LightningModule under evaluation, which answers calls with the same images once.

    Args:
        module: The module.
        answer: Takes images, (B, C, H, W), and how the module was called with them, None for the images alone.
        name: Whose forward it is, for messages.
    """

    def __init__(self, module: nn.Module, answer: Callable[[Tensor, Call | None], Any], name: str) -> None:
        super().__init__(module, answer)
        self._name = name
        self._answered: tuple[list[Any], int, Any] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the answer to the images: the first argument, or the first keyword argument that is a tensor."""
        images, call = split_call(args, kwargs)
        if not isinstance(images, Tensor):
            raise InputTypeError(
                f"{self._name} stands in for forward(images) and was given a {type(images).__name__}: let the "
                "module's step pass the image tensor. Lightning's default predict_step passes the whole batch: write "
                "predict_step(self, batch, batch_idx) that returns self(batch[0])"
            )
        key, version = [*args, *kwargs.values()], 0 if images.is_inference() else images._version
        if self._answered is not None and version == self._answered[1] and _are_same(key, self._answered[0]):
            return self._answered[2]
        output = self.forward(images, call)
        self._answered = key, version, output
        return output

    def clear(self) -> None:
        """Drop the answers to the last batch."""
        self._answered = None


def _are_same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
