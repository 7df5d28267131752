"""Settings of methods that are saved with results, so that results can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ttalight.engine.method import Method

__all__ = ["describe_method", "describe_optimizer"]


def describe_method(method: Method) -> dict[str, Any]:
    """Return the settings that every method has. Those that few results have are left out where they are the default.

    Args:
        method: The method.
    """
    rare: dict[str, Any] = {} if method.on_bad_batch == "error" else {"on_bad_batch": method.on_bad_batch}
    if method.passes is not None:
        rare["passes"] = method.passes.describe()
    for schedule in method.schedules:
        rare |= schedule.describe()
    return {
        "reset": method.reset,
        "prediction": method.prediction,
        "steps": getattr(method, "steps", None),
        "optimizer": None,
        "lr": None,
        "norm": getattr(method, "norm", None),
        **rare,
    }


def describe_optimizer(method: Method) -> dict[str, Any]:
    """Return name and rate of a method's optimizer, and the limit of the gradient where there is one.

    Args:
        method: A method with gradients.
    """
    optimizer = method.make_optimizer([nn.Parameter(torch.zeros(1))])
    clipped = {} if method.clip_norm is None else {"clip_norm": method.clip_norm}
    return {"optimizer": type(optimizer).__name__, "lr": float(optimizer.param_groups[0]["lr"]), **clipped}
