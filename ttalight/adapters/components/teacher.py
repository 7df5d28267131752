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

__all__ = ["Teacher", "network_parameters", "parameter_names"]


class Teacher:
    """The exponential moving average of the trainable parameters of a network, without the method's own.

    A teacher may have running statistics of its own. These do not follow the network's: passes of the teacher update
    them.

    Args:
        net: The network, whose present weights and statistics the teacher begins with.
        layers: BatchNorm layers of which the teacher has statistics of its own.
        name: Of its tensors in the state of the method.
    """

    def __init__(self, net: AdaptiveNetwork, layers: Sequence[NormLayer] = (), name: str = "teacher") -> None:
        self._layers, self._name = list(layers), name
        #: One tensor for each trainable parameter.
        self.weights = [parameter.detach().clone() for parameter in network_parameters(net)]
        #: Running mean and variance of each layer.
        self.statistics = [value.detach().clone() for layer in layers for value in layer.statistics]

    def state(self) -> dict[str, Tensor]:
        """Return weights and statistics by name, as part of a method's state."""
        named = {f"{self._name}.{number}": weight for number, weight in enumerate(self.weights)}
        return named | {f"{self._name}.statistics.{number}": value for number, value in enumerate(self.statistics)}

    @contextmanager
    def active(self, net: AdaptiveNetwork) -> Iterator[None]:
        """Let the network have the weights and statistics of the teacher temporarily."""
        own = [value for layer in self._layers for value in layer.statistics]
        with other_values(network_parameters(net), self.weights), other_values(own, self.statistics):
            yield

    def follow(self, net: AdaptiveNetwork, momentum: float) -> None:
        """Move the weights towards the network's.

        Args:
            net: The network.
            momentum: Share of the teacher that stays, in [0, 1].
        """
        ema_update_(self.weights, network_parameters(net), 1 - momentum)

    @torch.no_grad()
    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Give a copy of the network's module the weights and statistics of the teacher."""
        for name, weight in zip(parameter_names(net), self.weights, strict=True):
            module.get_parameter(name).copy_(weight)
        kept = [(layer.name, name) for layer in self._layers for name in ("running_mean", "running_var")]
        for (layer, name), value in zip(kept, self.statistics, strict=True):
            module.get_submodule(layer).get_buffer(name).copy_(value)


def network_parameters(net: AdaptiveNetwork) -> list[nn.Parameter]:
    """Return the trainable parameters of the network itself, which the method's own follow."""
    return net.parameters[: len(net.parameters) - len(net.own)]


def parameter_names(net: AdaptiveNetwork) -> list[str]:
    """Return the names of ``network_parameters`` in the network."""
    names = {id(parameter): name for name, parameter in net.module.named_parameters()}
    return [names[id(parameter)] for parameter in network_parameters(net)]
