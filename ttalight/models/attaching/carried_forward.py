"""BatchNorm layers whose instance carries a forward of its own: their statistics are chosen by their attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ttalight.errors import InputTypeError

__all__ = ["normalize_by"]

_OPTIONS = ("training", "track_running_stats", "momentum")


class _Layer(Protocol):
    """The parts of a ``NormLayer`` that choose its statistics."""

    name: str
    module: nn.Module
    passes: Any
    momentum: float

    @property
    def mode(self) -> str: ...
    def mixed(self, x: Tensor, mean: Tensor, var: Tensor, images: int, shared: bool) -> tuple[Tensor, Tensor]: ...


def normalize_by(own: Callable[..., Tensor], layer: _Layer, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """Normalise by a layer's own forward, with the statistics of the layer's mode.

    Args:
        own: The forward, which computes BatchNorm by the attributes of the layer.
        layer: The layer.
        args: What the forward takes.
        kwargs: The same.
    """
    module: Any = layer.module
    if layer.passes.shard is not None:
        raise InputTypeError(
            f"layer {layer.name} carries a forward of its own, which cannot share a batch among processes: use "
            "shard='domain', or remove it"
        )
    options, buffers = {name: getattr(module, name) for name in _OPTIONS}, dict(module._buffers)
    try:
        _choose(layer, (*args, *kwargs.values())[0])
        return own(*args, **kwargs)
    finally:
        for name, value in options.items():
            setattr(module, name, value)
        module._buffers.update(buffers)


def _choose(layer: _Layer, x: Tensor) -> None:
    """Set the attributes of a layer so that its forward uses the statistics of the layer's mode."""
    module: Any = layer.module
    has_own = module.running_mean is not None
    mode = layer.mode if layer.mode != "source" or has_own else "batch"
    if mode != "source" and x.numel() == x.shape[1] and has_own:
        mode = "source"
    module.training, module.track_running_stats = False, has_own
    if mode == "image" and len(x) > 1:
        raise InputTypeError(
            f"layer {layer.name} carries a forward of its own, which cannot normalise images one by one: remove it, or "
            "predict one image a batch"
        )
    if mode in ("alpha", "prior", "image") and has_own:
        mixed = layer.mixed(x, module.running_mean, module.running_var, len(x), False)
        module._buffers["running_mean"], module._buffers["running_var"] = mixed
    elif mode != "source":
        module._buffers["num_batches_tracked"] = None
        module.training = True
        module.track_running_stats = mode == "ema" and has_own
        module.momentum = 0.0 if layer.passes.repeating else layer.momentum
