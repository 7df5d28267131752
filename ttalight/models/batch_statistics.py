"""Means and variances of a batch, and normalisation by them, where torch's own are slow or coarse on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["moments", "move_running_statistics", "normalize_by_batch", "normalized"]


def moments(x: Tensor, dimensions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance, the latter biased, over some dimensions.

    Args:
        x: Without a graph.
        dimensions: Those that the results have not.
    """
    dimensions = list(dimensions)
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dimensions, correction=0)
        return mean, var
    # On the CPU two sums and a difference take a seventh of the time of torch.var_mean; the last digits may differ.
    mean = x.mean(dimensions, keepdim=True)
    return mean.squeeze(dimensions), (x - mean).square_().mean(dimensions)


def normalize_by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return what ``torch.batch_norm`` does in training, with gradients, and no running statistics.

    In ``channels_last`` on the CPU that sums one value after the other in float32, which for the layers of a small
    ResNet costs two digits of the gradients; here they are those of the default layout, in the same time.

    Args:
        x: (B, C, *), float32 or float64.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.
    """
    normalized: Tensor = _BatchNormalization.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return normalized


def normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps), times weight, plus bias, a channel: (B, C, *)."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    x = (x - mean.view(shape)) * scale.view(shape)
    return x if bias is None else x + bias.view(shape)


@torch.no_grad()
def move_running_statistics(layer: Any, mean: Tensor, var: Tensor, count: Tensor, momentum: float) -> None:
    """Move a layer's running mean and variance, the latter unbiased, towards those of ``count`` values a channel."""
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
    layer.running_var.lerp_((var * (count / (count - 1))).to(layer.running_var.dtype), momentum)


class _BatchNormalization(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        mean, var = moments(x, [0, *range(2, x.ndim)])
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, ctx.eps, wanted
        )
        return (*(own if want else None for own, want in zip(gradients, wanted, strict=True)), None)
