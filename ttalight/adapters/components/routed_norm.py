"""A normalisation layer with experts: each image is routed to weights and biases of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.models.norm import NormLayer

__all__ = ["RoutedNorm", "can_be_routed", "load_balance", "route"]


class RoutedNorm:
    """Stands in for a normalisation layer: its weight and bias, plus the offsets of the experts that an image goes to.

    The router is a linear layer on the mean, over all positions, of the layer's input. Offsets begin at zero, so the
    layer computes what it did. A batch of images goes along dimension 0 of the input, channels along the last
    dimension of a LayerNorm's input and dimension 1 of another's.

    Args:
        layer: The layer; its own parameters stay as they are.
        experts: Number of experts E.
        top: Experts for each image.
        generator: On the CPU, for the router's weights (Xavier-normal).
    """

    def __init__(self, layer: NormLayer, experts: int, top: int, generator: torch.Generator) -> None:
        self.layer = layer
        self.top = top
        weight, bias = self._shared
        offsets = torch.zeros(experts, len(weight), dtype=weight.dtype, device=weight.device)
        self.weight = nn.Parameter(offsets)
        self.bias = None if bias is None else nn.Parameter(offsets.clone())
        drawn = nn.init.xavier_normal_(torch.empty(experts, len(weight)), generator=generator)
        self.router_weight = nn.Parameter(drawn.to(weight))
        self.router_bias = nn.Parameter(offsets.new_zeros(experts))
        #: Load balance of the last pass with gradients.
        self.balance: Tensor | None = None

    @property
    def _shared(self) -> tuple[Tensor, Tensor | None]:
        return self.layer.module.weight, self.layer.module.bias  # type: ignore[return-value]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that adapt, by name."""
        named = {
            "experts.weight": self.weight,
            "experts.bias": self.bias,
            "router.weight": self.router_weight,
            "router.bias": self.router_bias,
        }
        return {f"{self.layer.name}.{name}": value for name, value in named.items() if value is not None}

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise ``x`` in the layer's mode and apply each image's weight and bias."""
        normal = self.layer.standardize(x)
        last = isinstance(self.layer.module, nn.LayerNorm)
        positions = tuple(range(1, x.ndim - 1) if last else range(2, x.ndim))
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.weight.dtype
            pooled = x.mean(positions, dtype=dtype) if positions else x.to(dtype)
            probabilities = F.linear(pooled, self.router_weight, self.router_bias).softmax(1)
            gates, load = route(probabilities, self.top)
            if torch.is_grad_enabled():
                self.balance = load_balance(probabilities, load)
            ones = [1] * len(positions)
            shape = (len(x), *ones, -1) if last else (len(x), -1, *ones)
            weight, bias = self._shared
            out = normal * (weight + gates @ self.weight).view(shape)
            if bias is not None and self.bias is not None:
                out = out + (bias + gates @ self.bias).view(shape)
        return out.to(normal.dtype)


def can_be_routed(layer: NormLayer) -> bool:
    """Return whether experts can replace a layer: a weight for each channel, and no forward of its own kind."""
    weight = getattr(layer.module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and layer.replaceable


def route(probabilities: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Choose the likeliest experts of each image.

    The gates of those chosen are their probabilities divided by the constant sum of these: 1 for a single expert, with
    the gradient of log r. Others have 0.

    Args:
        probabilities: r, the router's probabilities, (B, E).
        top: Experts for each image.

    Returns:
        Gates, (B, E), and the load, the share of choices that went to each expert, (E,), without gradient.
    """
    values, chosen = probabilities.topk(top, dim=1)
    shares = values / values.detach().sum(1, keepdim=True)
    gates = torch.zeros_like(probabilities).scatter(1, chosen, shares)
    return gates, torch.zeros_like(probabilities).scatter(1, chosen, 1.0).mean(0) / top


def load_balance(probabilities: Tensor, load: Tensor) -> Tensor:
    """E times the sum over experts of load and mean chance: 1 if all are used alike, E if one takes all; a scalar.

    Args:
        probabilities: The router's probabilities, (B, E); gradients flow through these.
        load: Share of the choices that went to each expert, (E,).
    """
    return len(load) * (load * probabilities.mean(0)).sum()
