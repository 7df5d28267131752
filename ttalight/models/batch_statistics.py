"""Means and variances of a batch, and normalisation by them, where torch's own are slow or fail on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "moments",
    "move_running_statistics",
    "normalize_by_batch",
    "normalize_by_moved",
    "normalize_each",
    "normalize_images",
    "normalized",
    "with_gradient_layout",
]


#: Numbers whose differences from the mean stay in the cache of a processor until they are summed.
_PART = 2**18


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
    if x.numel() <= _PART or torch.compiler.is_compiling():
        return mean.squeeze(dimensions), (x - mean).square_().mean(dimensions)
    rows = max(1, _PART * len(x) // x.numel())
    if 0 in dimensions:
        sums = [(part - mean).square_().sum(dimensions) for part in torch.split(x, rows)]
        return mean.squeeze(dimensions), torch.stack(sums).sum(0) / (x.numel() // mean.numel())
    parts = zip(torch.split(x, rows), torch.split(mean, rows), strict=True)
    return mean.squeeze(dimensions), torch.cat([(part - own).square_().mean(dimensions) for part, own in parts])


def normalize_by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return what ``torch.batch_norm`` does in training, with gradients, and no running statistics.

    On the CPU large batches take less time. In ``channels_last`` torch's layer sums one value after the other there, in
    float32, which for the layers of a small ResNet costs two digits of the gradients. Here they are those of the
    default layout.

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
    return normalize_images(x, mean, var, weight, bias, eps)


def normalize_images(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    """Normalise each image by statistics, weight and bias of its own, in one operation.

    Args:
        x: (B, C, *).
        mean: (B * C,).
        var: (B * C,).
        weight: (B * C,) or None.
        bias: (B * C,) or None.
        eps: Added to the variance.
    """
    images = x.reshape(1, -1, *x.shape[2:])  # a channel for each channel of each image
    # ``F.batch_norm`` wants a positive eps, and so does cuDNN.
    return torch.batch_norm(images, weight, bias, mean, var, False, 0.0, eps, False).view(x.shape)


def normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps), times weight, plus bias, a channel: (B, C, *)."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    x = (x - mean.view(shape)) * scale.view(shape)
    return x if bias is None else x + bias.view(shape)


def normalize_by_moved(x: Tensor, layer: Any, share: float, moves: bool = True) -> Tensor:
    """Move a layer's running statistics towards those of ``x``, and normalise by the moved ones: RobustBN.

    Gradients flow through the share that ``x`` has in the statistics. The variance of ``x`` is the biased one.

    L. Yuan, B. Xie, S. Li, *Robust Test-Time Adaptation in Dynamic Scenarios*, CVPR 2023, arXiv 2303.13899.

    Args:
        x: (B, C, *).
        layer: Has ``running_mean``, ``running_var``, ``weight``, ``bias`` and ``eps``.
        share: Share of ``x`` in the statistics, in [0, 1].
        moves: False where the statistics have been moved by ``x`` already.
    """
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    seen_mean, seen_var = moments(full.detach(), [0, *range(2, x.ndim)])
    mean, var = layer.running_mean.to(full.dtype, copy=True), layer.running_var.to(full.dtype, copy=True)
    if moves:
        mean, var = mean.lerp_(seen_mean, share), var.lerp_(seen_var, share)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    made: Tensor = _MovedNormalization.apply(full, layer.weight, layer.bias, mean, var, seen_mean, share, layer.eps)  # type: ignore[no-untyped-call]
    return made.to(x.dtype)


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


class _MovedNormalization(torch.autograd.Function):
    """Normalises by statistics of which those of the input are a share; gradients flow through that share."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, seen: Tensor, share: float, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, seen)
        ctx.share, ctx.eps = share, eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, seen = ctx.saved_tensors
        own, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0] and ctx.share:
            scale = (var + ctx.eps).rsqrt()
            factor = scale * (-ctx.share * x.shape[1] / x.numel())
            factor = factor if weight is None else factor * weight
            # The derivatives by mean and variance are -scale * weight times these sums, the latter over 2 and times
            # scale; those of mean and variance by a value are 1 / n and 2 (x - seen) / n.
            slope = factor * scale * of_weight
            shape = (1, -1, *[1] * (x.ndim - 2))
            own = own.add_((factor * of_bias - slope * seen).view(shape)).addcmul_(x, slope.view(shape))
        wanted = ctx.needs_input_grad[1:3]
        return own, of_weight if wanted[0] else None, of_bias if wanted[1] else None, *[None] * 5


def with_gradient_layout(x: Tensor) -> Tensor:
    """Return the input of a GroupNorm in a layout that torch can go backward from.

    In channels_last on the CPU torch 2.13 writes the gradient of an input that needs none, and crashes.
    """
    is_affected = x.device.type == "cpu" and x.ndim > 3 and torch.is_grad_enabled() and not x.requires_grad
    return x.contiguous() if is_affected else x
