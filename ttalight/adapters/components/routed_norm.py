"""A normalisation layer with experts: each image is routed to weights and biases of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.models.exported_norm import BatchStatistics, become
from ttalight.models.norm import NormLayer

__all__ = ["RoutedLayer", "RoutedNorm", "can_be_routed", "load_balance", "route", "routed"]


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
        last = isinstance(self.layer.module, nn.LayerNorm)
        affines = (*self._shared, self.weight, self.bias)
        router = self.router_weight, self.router_bias
        out, probabilities, load = routed(x, self.layer.standardize(x), affines, router, self.top, last)
        if torch.is_grad_enabled():
            self.balance = load_balance(probabilities, load)
        return out

    def export(self, layer: nn.Module) -> None:
        """Make a copy of the layer one that routes images as this does, in place."""
        standard = standard_layer(layer)
        made = become(layer, RoutedLayer)
        made.standard, made.top, made.last = standard, self.top, isinstance(standard, nn.LayerNorm)
        own = {"expert_weight": self.weight, "expert_bias": self.bias}
        for name, value in (own | {"router_weight": self.router_weight, "router_bias": self.router_bias}).items():
            made.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))


class RoutedLayer(nn.Module):
    """A normalisation layer of an exported network whose weight and bias are those of the experts of each image."""

    weight: Tensor
    bias: Tensor | None
    expert_weight: Tensor
    expert_bias: Tensor | None
    router_weight: Tensor
    router_bias: Tensor
    #: Normalises without weight and bias.
    standard: nn.Module
    top: int
    last: bool

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the images, then apply drop-out and activation of a fused layer."""
        affines = self.weight, self.bias, self.expert_weight, self.expert_bias
        x = routed(x, self.standard(x), affines, (self.router_weight, self.router_bias), self.top, self.last)[0]
        for name in ("drop", "act"):
            if name in self._modules:
                x = self._modules[name](x)  # type: ignore[misc]
        return x


def standard_layer(layer: Any) -> nn.Module:
    """Return a layer that normalises like a GroupNorm, a LayerNorm, or a BatchNorm on the batch, without its affine."""
    if isinstance(layer, nn.GroupNorm):
        return nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, affine=False)
    if isinstance(layer, nn.LayerNorm):
        return nn.LayerNorm(layer.normalized_shape, layer.eps, elementwise_affine=False)
    standard = nn.BatchNorm1d(layer.num_features, layer.eps, affine=False)
    for name in ("running_mean", "running_var"):
        value = getattr(layer, name)
        standard._buffers[name] = None if value is None else value.clone()
    return BatchStatistics.of(standard)


def routed(
    x: Tensor,
    normal: Tensor,
    affines: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    router: tuple[Tensor, Tensor],
    top: int,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply to each image the weight and bias of the experts that it goes to.

    Args:
        x: Input of the layer.
        normal: The same, normalised.
        affines: Weight and bias that all share, (C,), and the experts' offsets of them, (E, C).
        router: Weight, (E, C), and bias, (E,), of the router.
        top: Experts for each image.
        last: Whether channels are the last dimension, not dimension 1.

    Returns:
        The output, the router's probabilities, (B, E), and the experts' load, (E,).
    """
    weight, bias, expert_weight, expert_bias = affines
    positions = tuple(range(1, x.ndim - 1) if last else range(2, x.ndim))
    with torch.autocast(x.device.type, enabled=False):
        dtype = expert_weight.dtype
        pooled = x.mean(positions, dtype=dtype) if positions else x.to(dtype)
        probabilities = F.linear(pooled, *router).softmax(1)
        gates, load = route(probabilities, top)
        ones = [1] * len(positions)
        shape = (len(x), *ones, -1) if last else (len(x), -1, *ones)
        out = normal * (weight + gates @ expert_weight).view(shape)
        if bias is not None and expert_bias is not None:
            out = out + (bias + gates @ expert_bias).view(shape)
    return out.to(normal.dtype), probabilities, load


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
