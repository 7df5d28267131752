"""Normalisation layers as adaptation sees them: found by type, with a mode that no train() or eval() changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["NormLayer", "NormMode", "find_norms"]

#: ``source``: running statistics. ``batch``: those of the batch, running statistics untouched. ``ema``: those of the
#: batch, which also move the running statistics, as in training.
NormMode = Literal["source", "batch", "ema"]

_NORM_TYPES = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


class NormLayer:
    """One normalisation layer of a network, and the stand-in for its forward.

    Only layers of the BatchNorm family have statistics to choose; for GroupNorm and LayerNorm every mode is the
    layer's own forward. A BatchNorm layer that sees a single value a channel cannot estimate a variance: it falls
    back to its running statistics, and ``fallbacks`` counts how often.

    Args:
        name: Dotted name of the layer in the network.
        module: The layer.

    Raises:
        TypeError: If the layer is a BatchNorm with a forward of its own that cannot be stood in for.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.mode: NormMode = "source"
        self.momentum = 0.1
        self.fallbacks = 0
        self._before: Callable[..., Tensor] | None = None
        if self.is_batch_norm:
            _check_forward(name, module)
            own = getattr(module, "momentum", None)
            self.momentum = 0.1 if own is None else float(own)

    @property
    def is_batch_norm(self) -> bool:
        """Whether the layer has statistics to choose."""
        return isinstance(self.module, _BatchNorm)

    @property
    def affine(self) -> list[nn.Parameter]:
        """The layer's weight and bias, as far as it has them."""
        both = (getattr(self.module, "weight", None), getattr(self.module, "bias", None))
        return [parameter for parameter in both if isinstance(parameter, nn.Parameter)]

    @property
    def statistics(self) -> list[Tensor]:
        """The running mean and variance, as far as the layer has them."""
        both = (getattr(self.module, "running_mean", None), getattr(self.module, "running_var", None))
        return [buffer for buffer in both if isinstance(buffer, Tensor)]

    def attach(self) -> None:
        """Stand in for the layer's forward; GroupNorm and LayerNorm keep their own."""
        if self.is_batch_norm and "forward" not in vars(self.module):
            self.module.forward = self.forward

    def detach(self) -> None:
        """Give the layer its own forward back."""
        if vars(self.module).get("forward") == self.forward:
            del self.module.forward

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` in the present mode, then apply what a fused layer brings along (drop-out, activation)."""
        layer = self.module
        mean, var = self.statistics or (None, None)
        batch = mean is None or self.mode != "source"
        if batch and x.numel() == x.shape[1]:
            if mean is None:
                raise ValueError(
                    f"layer {self.name} sees one value a channel and has no running statistics: use more images a batch"
                )
            self.fallbacks += 1
            batch = False
        if batch and self.mode != "ema":
            mean = var = None
        momentum = self.momentum if self.mode == "ema" else 0.0
        x = F.batch_norm(x, mean, var, layer.weight, layer.bias, batch, momentum, layer.eps)  # type: ignore[arg-type]
        for name in ("drop", "act"):
            if name in layer._modules:
                x = layer._modules[name](x)  # type: ignore[misc]
        return x


def find_norms(network: nn.Module) -> list[NormLayer]:
    """Return the normalisation layers of a network in the order of its modules.

    BatchNorm (timm's fused variants included), GroupNorm and LayerNorm are found by type, wherever they stand.

    Args:
        network: Any module.
    """
    return list(_walk(network))


def _walk(network: nn.Module) -> Iterator[NormLayer]:
    for name, module in network.named_modules():
        if isinstance(module, _NORM_TYPES):
            yield NormLayer(name, module)


def _check_forward(name: str, module: nn.Module) -> None:
    fused = {"drop", "act"} <= module._modules.keys()
    if not fused and type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise TypeError(
            f"layer {name} is a {type(module).__name__}, a BatchNorm with a forward of its own; its statistics "
            "cannot be chosen. Use torch.nn.BatchNorm2d, or a layer with 'drop' and 'act' submodules like timm's "
            "BatchNormAct2d"
        )
