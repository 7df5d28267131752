"""Teachers: weights and statistics beside those of a network, which follow them slowly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ttalight.adapters.components.regularization import ema_update_
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.models.norm import NormLayer
from ttalight.models.vectors import other_values

__all__ = ["Teacher"]


class Teacher:
    """The exponential moving average of a network's trainable parameters.

    A teacher may have running statistics of its own. These do not follow the network's: passes of the teacher update
    them.

    Args:
        net: The network, whose present weights and statistics the teacher begins with.
        layers: BatchNorm layers of which the teacher has statistics of its own.
    """

    def __init__(self, net: AdaptiveNetwork, layers: Sequence[NormLayer] = ()) -> None:
        self._layers = list(layers)
        #: One tensor for each trainable parameter.
        self.weights = [parameter.detach().clone() for parameter in net.parameters]
        #: Running mean and variance of each layer.
        self.statistics = [value.detach().clone() for layer in layers for value in layer.statistics]

    def state(self) -> dict[str, Tensor]:
        """Return weights and statistics by name, as part of a method's state."""
        named = {f"teacher.{number}": weight for number, weight in enumerate(self.weights)}
        return named | {f"teacher.statistics.{number}": value for number, value in enumerate(self.statistics)}

    @contextmanager
    def active(self, net: AdaptiveNetwork) -> Iterator[None]:
        """Let the network have the weights and statistics of the teacher temporarily."""
        own = [value for layer in self._layers for value in layer.statistics]
        with net.with_weights(self.weights), other_values(own, self.statistics):
            yield

    def follow(self, net: AdaptiveNetwork, momentum: float) -> None:
        """Move the weights towards the network's.

        Args:
            net: The network.
            momentum: Share of the teacher that stays, in [0, 1].
        """
        ema_update_(self.weights, net.parameters, 1 - momentum)

    @torch.no_grad()
    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Give a copy of the network's module the weights and statistics of the teacher."""
        names = {id(parameter): name for name, parameter in net.module.named_parameters()}
        for parameter, weight in zip(net.parameters, self.weights, strict=True):
            module.get_parameter(names[id(parameter)]).copy_(weight)
        kept = [(layer.name, name) for layer in self._layers for name in ("running_mean", "running_var")]
        for (layer, name), value in zip(kept, self.statistics, strict=True):
            module.get_submodule(layer).get_buffer(name).copy_(value)
