"""Instance-aware batch normalisation: statistics of all images, corrected by those of each where they differ much."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ttalight.errors import InputError
from ttalight.models.batch_statistics import moments

__all__ = [
    "InstanceAwareBatchNorm",
    "batch_moments",
    "image_moments",
    "normalize_instance_aware",
    "with_instance_aware_norm",
]


class InstanceAwareBatchNorm(_BatchNorm):
    """Batch normalisation with statistics that each image corrects (IABN).

    In training the statistics are those of the batch, gradients through them included, which also move the running
    ones as in ``torch.nn.BatchNorm2d``, and in eval mode the running ones. Of the difference between them and those of
    an image only what exceeds ``k`` standard errors is kept; see ``normalize_instance_aware``. Parameters and buffers
    have the names of ``torch.nn.BatchNorm2d``. In several processes each takes the statistics of its own images. Inputs
    are (B, C, *).

    Source: T. Gong, J. Jeong, T. Kim, Y. Kim, J. Shin, S.-J. Lee, *NOTE: Robust Continual Test-time Adaptation Against
    Temporal Correlation*, NeurIPS 2022, arXiv 2208.05117.

    Args:
        num_features: Channels C.
        k: Standard errors by which statistics of an image may differ without being corrected for, at least 0.
        kwargs: See ``torch.nn.BatchNorm2d``.

    Raises:
        ValueError: If ``k`` is negative. In training, if the batch has a single value a channel.
    """

    #: The default of ``k``, with which layers that ``with_instance_aware_norm`` makes correct statistics.
    k = 4.0

    def __init__(self, num_features: int, k: float = 4.0, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        if not k >= 0:
            raise InputError(f"k must be at least 0, got {k}")
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised, after drop-out and activation of a fused layer."""
        with torch.autocast(x.device.type, enabled=False):
            full = x.to(torch.promote_types(x.dtype, torch.float32))
            own = image_moments(full)
            given = self.running_mean, self.running_var
            if self.training or given[0] is None:
                given = self._of_batch(own, math.prod(x.shape[2:]))
            x = normalize_instance_aware(full, own, given, self, self.k).to(x.dtype)  # type: ignore[arg-type]
        for name in ("drop", "act"):
            if name in self._modules:
                x = self._modules[name](x)  # type: ignore[misc]
        return x

    def _of_batch(self, own: tuple[Tensor, Tensor], pixels: int) -> tuple[Tensor, Tensor]:
        """Return the statistics of a batch, and in training move the running ones towards them."""
        if len(own[0]) * pixels == 1:
            raise InputError(f"expected more than one value a channel, got a batch of one image and {pixels} pixel")
        mean, var = batch_moments(*own, pixels)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None, "it is there together with the running statistics"
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = float(1 / self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(var.to(self.running_var.dtype), share)
        return mean, var

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{super().extra_repr()}, k={self.k:g}"  # type: ignore[no-untyped-call]


def with_instance_aware_norm(network: nn.Module) -> nn.Module:
    """Turn the BatchNorm layers of a network into ``InstanceAwareBatchNorm`` layers, in place, and return it.

    Weights, statistics and settings stay, and so do drop-out and activation of timm's fused layers.

    Args:
        network: The network.

    Raises:
        ValueError: If it has no BatchNorm layer, or one that computes something of its own.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
    if not layers:
        raise InputError(
            f"{type(network).__name__} has no BatchNorm layer that could be instance-aware: use another network, or "
            "norm: batch"
        )
    for name, layer in layers.items():
        if type(layer).forward is not _BatchNorm.forward and not {"drop", "act"} <= layer._modules.keys():
            raise InputError(
                f"layer {name} is a {type(layer).__name__} with a forward of its own, which instance-aware statistics "
                "would replace: use torch.nn's layer, or norm: batch"
            )
        layer.__class__ = InstanceAwareBatchNorm
    return network


def normalize_instance_aware(
    x: Tensor, own: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor], layer: Any, k: float | Tensor
) -> Tensor:
    """Return ``x``, (B, C, *), normalised by given statistics, corrected by those of each image (IABN).

    With n pixels the standard errors of an image's mean and variance are sqrt(v / n) and v sqrt(2 / (n - 1)), v being
    the given variance plus the layer's ``eps``. Differences lose ``k`` standard errors and are 0 below that. Images of
    one pixel have no statistics, and are normalised by the given ones.

    Args:
        x: The images, float32 or float64.
        own: Mean and unbiased variance of each image, (B, C) both.
        given: Mean and variance, (C,) both.
        layer: Has ``weight``, ``bias`` and ``eps``.
        k: At least 0.
    """
    (mean, var), pixels = given, math.prod(x.shape[2:])
    if pixels > 1:
        noisy = var + layer.eps
        # The corrected variance is not below 0: it is between the given one and the image's.
        mean = mean + _shrunk(own[0] - mean, k * (noisy / pixels).sqrt())
        var = var + _shrunk(own[1] - var, k * math.sqrt(2 / (pixels - 1)) * noisy)
    scale = (var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = (-1, x.shape[1], *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _shrunk(values: Tensor, limits: Tensor) -> Tensor:
    """Return values moved towards 0 by limits, 0 within these."""
    return values - values.clamp(-limits, limits)


def image_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of each image, (B, C) both, of (B, C, *), with gradients.

    The variance of a single pixel is 0.
    """
    if x.ndim == 2:
        return x, torch.zeros_like(x)
    mean, var = _ImageMoments.apply(x)  # type: ignore[no-untyped-call]
    return mean, var


def batch_moments(mean: Tensor, var: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of a batch, (C,) both.

    Args:
        mean: Of each image, (B, C).
        var: Unbiased, of each image, (B, C).
        pixels: Of an image.
    """
    center = mean.mean(0)
    squares = (pixels - 1) * var + pixels * (mean - center).square()
    return center, squares.sum(0) / (len(mean) * pixels - 1)


class _ImageMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = moments(x, list(range(2, x.ndim)))
        pixels = math.prod(x.shape[2:])
        ctx.save_for_backward(x, mean)
        return mean, var * (pixels / max(1, pixels - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        pixels, shape = math.prod(x.shape[2:]), (*mean.shape, *[1] * (x.ndim - 2))
        slope = of_var * (2 / max(1, pixels - 1))
        return torch.addcmul((of_mean / pixels - slope * mean).view(shape), x, slope.view(shape))
