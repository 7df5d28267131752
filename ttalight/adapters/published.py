"""Published settings of methods, as arguments and optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ttalight.errors import InputError

__all__ = ["make_published_optimizer", "split_settings"]

#: Settings that belong to the optimizer, and those that are neither its nor an argument.
_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay")
_OTHERS = ("optimizer", "lr_per_image", "batch_size")


def split_settings(settings: dict[str, Any], batch_size: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a method among its published settings, and all settings with a rate.

    Args:
        settings: Published for a benchmark.
        batch_size: Images a batch, for a rate that was published for each image.

    Raises:
        ValueError: If the rate needs ``batch_size``.
    """
    settings = dict(settings)
    if "lr" not in settings or (batch_size is not None and "lr_per_image" in settings):
        if batch_size is None:
            raise InputError("its learning rate is published for each image: give batch_size=")
        settings["lr"] = settings["lr_per_image"] * batch_size
    return {name: value for name, value in settings.items() if name not in (*_OPTIONS, *_OTHERS)}, settings


def make_published_optimizer(settings: dict[str, Any], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return the optimizer of published settings, in torch's fused form where it has one for these parameters.

    Args:
        settings: Name of the optimizer (Adam by default), its rate, momentum and so on.
        parameters: The parameters that it updates.
    """
    make: Any = getattr(torch.optim, settings.get("optimizer", "Adam"))
    options = {name: settings[name] for name in _OPTIONS if name in settings}
    try:
        optimizer: Optimizer = make(parameters, **options, fused=True)
    except (RuntimeError, TypeError):
        optimizer = make(parameters, **options)
    return optimizer
