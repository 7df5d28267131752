"""Adapted networks as ordinary modules."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ttalight.engine.engine import Engine
from ttalight.engine.method import Method
from ttalight.errors import InputTypeError, UsageError
from ttalight.models.exported_norm import fold

__all__ = ["exported", "source_of"]


def exported(engine: Engine, statistics_from: Tensor | None = None) -> nn.Module:
    """Return a copy of an adapted network that predicts what ``engine.predict`` returns; see ``AdaptedNetwork.export``.

    Args:
        engine: The engine.
        statistics_from: (B, 3, H, W), as the network expects them.
    """
    method, net = engine.method, engine.net
    if engine.state is None:
        raise UsageError("there is no adapted network to export yet: adapt to a batch, or load a state, first")
    check_defined(method)
    with engine.next_state():
        module = copy_of(engine)
        method.export(net, module)
    module.zero_grad(set_to_none=True)
    module.eval()
    if statistics_from is not None:
        fold(net.norms, module, statistics_from)
    return module


def copy_of(engine: Engine) -> nn.Module:
    """Return a copy of an engine's network with its present weights, and flags as before adaptation."""
    module = copy.deepcopy(engine.net.module)
    if engine.takeover is not None:
        engine.takeover.restore_copy(module)
    return module


def source_of(engine: Engine) -> nn.Module:
    """Return a copy of an engine's network as it was before adaptation."""
    with engine.at_source():
        return copy_of(engine)


def check_defined(method: Method) -> None:
    """Check that a method which predicts in its own way says how that is exported.

    Raises:
        TypeError: If it does not.
    """
    ways = {name: _place(method, name) for name in ("predict", "export")}
    if ways["predict"] < ways["export"]:
        raise InputTypeError(
            f"{type(method).__name__} predicts in a way of its own and does not say how that is exported: define export"
        )


def _place(method: Method, name: str) -> int:
    return next(place for place, cls in enumerate(type(method).__mro__) if name in vars(cls))
