"""Means and variances of a batch, and normalisation by them, where torch's own are slow or coarse on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["moments", "move_running_statistics", "normalize_by_batch", "normalize_each", "normalized"]


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


def normalize_each(
    x: Tensor, mean: Tensor, var: Tensor, share: float | Tensor, weight: Any, bias: Any, eps: float
) -> Tensor:
    """Normalise each image by given statistics mixed with its own, as a batch of that image alone would be.

    Args:
        x: (B, C, *). With one value a channel and image there are no own statistics, and the given ones are used.
        mean: (C,).
        var: (C,).
        share: Share of the image's own statistics.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.
    """
    if x.numel() == len(x) * x.shape[1]:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    seen_mean, seen_var = moments(x.detach().to(mean.dtype), list(range(2, x.ndim)))
    mean, var = (own.lerp(seen, share).flatten() for own, seen in ((mean, seen_mean), (var, seen_var)))
    weight, bias = (None if value is None else value.repeat(len(x)) for value in (weight, bias))
    images = x.reshape(1, -1, *x.shape[2:])  # a channel for each channel of each image
    return F.batch_norm(images, mean, var, weight, bias, False, 0.0, eps).view(x.shape)


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
