"""Normalisation layers as adaptation sees them: found by type, with a mode that no train() or eval() changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ttalight.distributed import global_moments
from ttalight.models.batch_shard import BatchShard
from ttalight.models.batch_statistics import moments, normalize_by_batch

__all__ = ["NormLayer", "NormMode", "exact_statistics", "find_norms", "unmoved"]

#: ``source``: running statistics. ``batch``: those of the batch, running statistics untouched. ``ema``: those of the
#: batch, which also move the running statistics, as in training. ``alpha``: running and batch statistics mixed, the
#: batch's share being the layer's ``alpha``. ``prior``: the same with a share of n / (n + N) for n images.
NormMode = Literal["source", "batch", "ema", "alpha", "prior"]

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
        #: The batch's share in mode ``alpha``; the images N that the source statistics count as in mode ``prior``.
        self.alpha, self.prior = 0.1, 16.0
        self.fallbacks = 0
        #: Whether statistics of a batch are summed up exactly whatever the layout; see ``normalize_by_batch``.
        self.exact = False
        #: Where passes are dealt out over processes: statistics are then those of the whole batch.
        self.shard: BatchShard | None = None
        self._replacement: Callable[[Tensor], Tensor] | None = None
        #: Whether the layer has statistics to choose.
        self.is_batch_norm = isinstance(module, _BatchNorm)
        #: What a fused layer brings along.
        self._tail = [part for part in ("drop", "act") if part in module._modules]
        if self.is_batch_norm:
            _check_forward(name, module, _BatchNorm.forward, nn.SyncBatchNorm.forward)
            own = getattr(module, "momentum", None)
            self.momentum = 0.1 if own is None else float(own)

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

    @property
    def replaceable(self) -> bool:
        """Whether ``replace`` can stand in for the layer: it computes what torch.nn's layer of its kind does."""
        if self.is_batch_norm:
            return True  # the constructor has looked at its forward
        kind = nn.GroupNorm if isinstance(self.module, nn.GroupNorm) else nn.LayerNorm
        x = _example(self.module)
        with torch.no_grad():
            usual = self._finish(kind.forward(self.module, x))  # type: ignore[arg-type]
            try:
                return torch.allclose(type(self.module).forward(self.module, x), usual, rtol=1e-2, atol=1e-2)
            except (RuntimeError, IndexError, TypeError):  # it wants other input
                return False

    def attach(self) -> None:
        """Stand in for the layer's forward; GroupNorm and LayerNorm keep their own."""
        if self.is_batch_norm and "forward" not in vars(self.module):
            self.module.forward = self.forward

    def replace(self, normalize: Callable[[Tensor], Tensor]) -> None:
        """Normalise by a function of the method's own, affine included; what a fused layer brings along still follows.

        Raises:
            TypeError: If the layer does something else than to normalise over its input's usual dimensions.
        """
        if not self.replaceable:
            raise TypeError(
                f"layer {self.name} is a {type(self.module).__name__} that computes something else than torch.nn's "
                "layer of its kind, so it cannot be stood in for: leave it as it is, or use torch.nn's layer"
            )
        self._replacement = normalize
        self.module.forward = self.forward

    def detach(self) -> None:
        """Give the layer its own forward back."""
        self._replacement = None
        if vars(self.module).get("forward") == self.forward:
            del self.module.forward

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Normalise as the source model does for a while: by running statistics, nothing standing in."""
        before = self.mode, self._replacement
        self.mode, self._replacement = "source", None
        try:
            yield
        finally:
            self.mode, self._replacement = before

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` in the present mode, then apply what a fused layer brings along (drop-out, activation)."""
        if self._replacement is not None:
            return self._finish(self._replacement(x))
        if not self.is_batch_norm:
            own: Tensor = type(self.module).forward(self.module, x)
            return own
        return self._finish(self._normalize(x, self.module.weight, self.module.bias))

    def standardize(self, x: Tensor) -> Tensor:
        """Normalise ``x`` in the present mode, without the layer's weight and bias."""
        layer = self.module
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, None, None, layer.eps)
        if isinstance(layer, nn.LayerNorm):
            return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
        return self._normalize(x, None, None)

    def _finish(self, x: Tensor) -> Tensor:
        for name in self._tail:
            x = self.module._modules[name](x)  # type: ignore[misc]
        return x

    def _normalize(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        layer: Any = self.module
        if self.mode == "batch" and self.shard is None and x.numel() != x.shape[1]:
            if self.exact and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
                return normalize_by_batch(x, weight, bias, layer.eps)
            # By far the most frequent, so without the functional's look at the shape that this has just been.
            return torch.batch_norm(x, weight, bias, None, None, True, 0.0, layer.eps, torch.backends.cudnn.enabled)
        mean, var = layer.running_mean, layer.running_var
        batch = mean is None or self.mode != "source"
        shared = self.shard is not None and self.shard.images > 0
        images = self._shared_images(x) if batch and shared else len(x)
        if batch and images * (x.numel() // len(x)) == x.shape[1]:
            if mean is None:
                raise ValueError(
                    f"layer {self.name} sees one value a channel and has no running statistics: use more images a batch"
                )
            self.fallbacks += 1
            batch = False
        momentum = 0.0
        if batch and mean is not None and self.mode in ("alpha", "prior"):
            mean, var = self._mixed(x, mean, var, images, shared)
            batch = False
        elif batch and shared:
            return self._by_all(x, weight, bias)
        elif batch and self.mode == "ema":
            momentum = self.momentum
        elif batch:
            mean = var = None
        return F.batch_norm(x, mean, var, weight, bias, batch, momentum, layer.eps)

    def _mixed(self, x: Tensor, mean: Tensor, var: Tensor, images: int, shared: bool) -> tuple[Tensor, Tensor]:
        share = self.alpha if self.mode == "alpha" else images / (images + self.prior)
        # Mixed statistics are constants to the gradient: running ones cannot carry any.
        x = x.detach().to(mean.dtype)
        if shared:
            seen_mean, seen_var = self._shared_moments(x)[:2]
        else:
            seen_mean, seen_var = moments(x, [0, *range(2, x.ndim)])
        return mean.lerp(seen_mean, share), var.lerp(seen_var, share)

    # -- batches that are dealt out over processes

    def _shared_images(self, x: Tensor) -> int:
        assert self.shard is not None
        if len(x) != self.shard.rows:
            raise ValueError(
                f"layer {self.name} sees {len(x)} rows where the pass has {self.shard.rows} images: shard='batch' "
                "needs one row an image in every BatchNorm layer; use shard='domain'"
            )
        return self.shard.images

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives stay where they are in the order of things
    def _shared_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.shard is not None
        return global_moments(x[: self.shard.valid])

    def _by_all(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        """Normalise with statistics of the whole batch, gradients through these included."""
        layer: Any = self.module
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = self._shared_moments(full)
        if self.mode == "ema" and layer.running_mean is not None:
            move_running_statistics(layer, mean, var, count, self.momentum)
        return normalized(full, mean, var, weight, bias, layer.eps).to(x.dtype)


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


def find_norms(network: nn.Module) -> list[NormLayer]:
    """Return the normalisation layers of a network in the order of its modules.

    BatchNorm (timm's fused variants included), GroupNorm and LayerNorm are found by type, wherever they stand.

    Args:
        network: Any module.
    """
    return list(_walk(network))


@contextmanager
def exact_statistics(norms: Sequence[NormLayer]) -> Iterator[None]:
    """Sum statistics of a batch up exactly for a while.

    Args:
        norms: The layers.
    """
    for norm in norms:
        norm.exact = True
    try:
        yield
    finally:
        for norm in norms:
            norm.exact = False


@contextmanager
def unmoved(norms: Sequence[NormLayer]) -> Iterator[None]:
    """Give what passes move its present value back: running statistics, and the count of fallbacks.

    Args:
        norms: The layers.
    """
    before = [([value.clone() for value in norm.statistics], norm.fallbacks) for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, (statistics, fallbacks) in zip(norms, before, strict=True):
                norm.fallbacks = fallbacks
                for value, earlier in zip(norm.statistics, statistics, strict=True):
                    value.copy_(earlier)


def _walk(network: nn.Module) -> Iterator[NormLayer]:
    for name, module in network.named_modules():
        if isinstance(module, _NORM_TYPES):
            yield NormLayer(name, module)


def _example(layer: Any) -> Tensor:
    """Return a small input for a GroupNorm or LayerNorm: two images, with what is normalised apart in between."""
    shape = (2, layer.num_channels, 2, 2) if isinstance(layer, nn.GroupNorm) else (2, 3, *layer.normalized_shape)
    options = {} if layer.weight is None else {"dtype": layer.weight.dtype, "device": layer.weight.device}
    return torch.linspace(-9, 9, math.prod(shape)).sin().view(shape).to(**options)


def _check_forward(name: str, module: nn.Module, *known: Callable[..., Tensor]) -> None:
    fused = {"drop", "act"} <= module._modules.keys()
    if not fused and type(module).forward not in known:
        raise TypeError(
            f"layer {name} is a {type(module).__name__}, a normalisation layer with a forward of its own; it cannot be "
            "stood in for. Use torch.nn's layer, or one with 'drop' and 'act' submodules like timm's BatchNormAct2d"
        )
