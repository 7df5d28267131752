"""Calls of a model with the images and further arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttalight.models.outputs import map_tensors

__all__ = ["Call", "present_autocast", "split_call"]


class Call:
    """Calls a model with other images than the caller's and with the caller's further arguments.

    Args:
        args: Further positional arguments, behind the images.
        kwargs: Further keyword arguments.
        name: Keyword that the images are passed by; None for the first position.
    """

    def __init__(
        self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, name: str | None = None
    ) -> None:
        self.args, self.kwargs, self.name = args, kwargs or {}, name

    def __call__(self, run: Callable[..., Any], images: Tensor) -> Any:
        """Return what the model returns.

        Args:
            run: The model.
            images: (B, 3, H, W).
        """
        if self.name is None:
            return run(images, *self.args, **self.kwargs)
        return run(*self.args, **{self.name: images}, **self.kwargs)

    def of(self, keep: Tensor, images: int) -> Call:
        """Return the call for some images of a batch: tensors with one row an image keep the rows of these.

        Args:
            keep: Places of the images, int64 (K,).
            images: Images of the batch.
        """
        args, kwargs = map_tensors((self.args, self.kwargs), partial(_rows, keep, images))
        return Call(args, kwargs, self.name)


def present_autocast(device: str) -> Callable[[], torch.autocast]:
    """Return a maker of the autocast context that is in force now, for passes under another one.

    Args:
        device: Type of the device.
    """
    # Without the cache a cast made under no_grad cannot be mistaken for one that carries gradients.
    return partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call | None]:
    """Return the images of a call and what else it passes.

    Args:
        args: Positional arguments: the images are the first one.
        kwargs: Keyword arguments: without positional ones the images are the first tensor among these.

    Returns:
        The images, or whatever stands in their place, and the call; None where that is of the images alone.
    """
    if args:
        return args[0], Call(args[1:], kwargs) if kwargs or len(args) > 1 else None
    name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    others = {other: value for other, value in kwargs.items() if other != name}
    return kwargs.get(name) if name is not None else None, Call((), others, name)


def _rows(keep: Tensor, images: int, value: Tensor) -> Tensor:
    return value.index_select(0, keep) if value.ndim and len(value) == images else value
