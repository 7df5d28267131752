"""A projector in front of a contrastive loss, whose weights adapt with the network's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Projector"]


class Projector:
    """Maps features to vectors that are compared: Linear, ReLU, Linear.

    Weights and biases are distributed as those of ``torch.nn.Linear``. Give ``parameters`` to
    ``AdaptiveNetwork.set_trainable`` as the method's own: they are updated, reset and saved with the network's.

    Args:
        features: Dimension D of the features.
        width: Dimension of the hidden layer and of the output.
        generator: On the CPU.
        like: A tensor of the type and on the device of the weights.
    """

    def __init__(self, features: int, width: int, generator: torch.Generator, like: Tensor) -> None:
        #: The parameters that adapt, by name.
        self.parameters: dict[str, nn.Parameter] = {}
        for name, inputs in (("hidden", features), ("output", width)):
            bound = 1 / math.sqrt(inputs)
            for kind, shape in (("weight", (width, inputs)), ("bias", (width,))):
                drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
                self.parameters[f"projector.{name}.{kind}"] = nn.Parameter(drawn.to(like))

    def __call__(self, features: Tensor) -> Tensor:
        """Project features, (..., D)."""
        hidden_weight, hidden_bias, weight, bias = self.parameters.values()
        return F.linear(F.linear(features, hidden_weight, hidden_bias).relu(), weight, bias)
