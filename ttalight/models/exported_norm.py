"""BatchNorm layers of exported networks: the statistics that a method chose, in plain modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ttalight.errors import InputTypeError
from ttalight.models.batch_statistics import moments, normalize_each
from ttalight.models.norm import NormLayer, NormMode

__all__ = ["BatchStatistics", "ExportedNorm", "ImageStatistics", "MixedStatistics", "become", "fold", "replace_norms"]

M = TypeVar("M", bound=nn.Module)
N = TypeVar("N", bound="ExportedNorm")

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class ExportedNorm(nn.Module):
    """Base of the BatchNorm layers of exported networks, made of layers by ``of``.

    ``train()`` and ``eval()`` make no difference. The statistics of the source are the buffers ``source_mean`` and
    ``source_var``. They are not named like running statistics, so that no ordinary layer loads them as its own.
    Drop-out and activation of a fused layer stay its submodules ``drop`` and ``act``.
    """

    weight: Tensor | None
    bias: Tensor | None
    source_mean: Tensor | None
    source_var: Tensor | None
    eps: float

    @classmethod
    def of(cls: type[N], layer: nn.Module) -> N:
        """Turn a BatchNorm layer into one of this class, in place."""
        buffers = [layer._buffers.pop(name, None) for name in _RUNNING]
        made = become(layer, cls)
        made.register_buffer("source_mean", buffers[0])
        made.register_buffer("source_var", buffers[1])
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, *), then apply drop-out and activation of a fused layer."""
        x = self.normalize(x)
        for name in ("drop", "act"):
            if name in self._modules:
                x = self._modules[name](x)  # type: ignore[misc]
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised by ``statistics``. One value a channel is normalised by the source's."""
        mean, var = self.source_mean, self.source_var
        if mean is None or x.numel() != x.shape[1]:
            mean, var = self.statistics(x)
        return F.batch_norm(x, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)

    @property
    def source(self) -> tuple[Tensor, Tensor]:
        """The source's mean and variance, (C,) each, of layers that are not without them."""
        assert self.source_mean is not None
        assert self.source_var is not None
        return self.source_mean, self.source_var

    def statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean and variance, (C,) each, that ``x`` is normalised by; None for its own."""
        raise NotImplementedError

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and variance, (C,) each, that ``x`` is normalised by, its own among them."""
        mean, var = self.statistics(x)
        return moments(x, [0, *range(2, x.ndim)]) if mean is None or var is None else (mean, var)

    def extra_repr(self) -> str:
        """Return the settings."""
        named = {"eps": self.eps, **{name: getattr(self, name, None) for name in ("above", "share", "images")}}
        return ", ".join(f"{name}={float(value):g}" for name, value in named.items() if value)


class BatchStatistics(ExportedNorm):
    """Normalises with the statistics of the batch."""

    #: Batches of at most so many images are normalised with the source's statistics.
    above = 0

    def statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return None for the batch's own, or the source's where the batch is small."""
        return (None, None) if len(x) > self.above else (self.source_mean, self.source_var)


class MixedStatistics(ExportedNorm):
    """Normalises with the source's statistics mixed with the batch's.

    The batch's share is the buffer ``share``, or n / (n + ``images``) of n images where there is that buffer instead.
    """

    share: Tensor | None
    images: Tensor | None

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed statistics."""
        mean, var = self.source
        seen_mean, seen_var = moments(x.detach().to(mean.dtype), [0, *range(2, x.ndim)])
        share = len(x) / (len(x) + self.images) if self.images is not None else self.share
        assert share is not None, "one of both is set"
        return mean.lerp(seen_mean, share.to(mean.dtype)), var.lerp(seen_var, share.to(var.dtype))


class ImageStatistics(ExportedNorm):
    """Normalises each image with the source's statistics mixed with its own, whose share is the buffer ``share``."""

    share: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised."""
        mean, var = self.source
        return normalize_each(x, mean, var, self.share.to(mean.dtype), self.weight, self.bias, self.eps)

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raise a TypeError: the images have no statistics in common."""
        raise InputTypeError("statistics of some images cannot be folded into layers that normalise images singly")


def become(layer: nn.Module, kind: type[M]) -> M:
    """Make a module one of another class, in place: hooks, submodules and references to it stay.

    Weights that are computed by ``torch.nn.utils.parametrize`` become parameters.
    """
    computed = {}
    if is_parametrized(layer):  # remove_parametrizations would change the class, which copies share
        names = list(layer.parametrizations)  # type: ignore[arg-type]
        computed = {name: nn.Parameter(getattr(layer, name).detach().clone()) for name in names}
        del layer._modules["parametrizations"]
    layer.__class__ = kind
    for name, value in computed.items():
        layer.register_parameter(name, value)
    return layer  # type: ignore[return-value]


def replace_norms(norms: Sequence[NormLayer], module: nn.Module, mode: NormMode | None = None, above: int = 0) -> None:
    """Let the BatchNorm layers of a copy of a network normalise as those of the network do, without moving statistics.

    Layers that normalise with their running statistics stay what they are.

    Args:
        norms: The layers of the network.
        module: The copy.
        mode: Mode of all layers; by default each layer's own.
        above: In mode ``batch``, the number of images up to which batches are normalised with running statistics.

    Raises:
        TypeError: If something stands in for a layer's normalisation, or it carries a forward of its own.
    """
    for norm in norms:
        used = norm.mode if mode is None else mode
        if norm.replaced or (used != "source" and norm.carries_forward):
            what = "is normalised by a function of the method" if norm.replaced else "carries a forward of its own"
            raise InputTypeError(f"layer {norm.name} {what}, so it cannot be exported as a module")
        if used != "source" and norm.is_batch_norm:
            _replace(norm, module.get_submodule(norm.name), used, above)


def _replace(norm: NormLayer, layer: nn.Module, mode: NormMode, above: int) -> None:
    if mode in ("batch", "ema") or not norm.statistics:
        BatchStatistics.of(layer).above = above
        return
    made = ImageStatistics.of(layer) if mode == "image" else MixedStatistics.of(layer)
    for name in ("share", "images"):
        made.register_buffer(name, None)
    name, value = ("images", norm.prior) if mode == "prior" else ("share", norm.alpha)
    setattr(made, name, torch.tensor(value, dtype=torch.float64, device=norm.statistics[0].device))


@torch.no_grad()
def fold(norms: Sequence[NormLayer], module: nn.Module, images: Tensor) -> None:
    """Make the BatchNorm layers of an exported network ordinary ones, whose running statistics are those of a batch.

    Args:
        norms: The layers of the network that was exported.
        module: The exported network.
        images: (B, 3, H, W).

    Raises:
        TypeError: If a layer normalises images one by one or in groups, for which no statistics are those of all, or
            if it normalises several times.
    """
    layers = {norm: module.get_submodule(norm.name) for norm in norms}
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if layer in seen:
            raise InputTypeError(
                "statistics cannot be folded into layers that normalise more than once in a pass, as those of a "
                "network and of its teacher: export without statistics_from"
            )
        seen[layer] = layer.folded(*inputs)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values() if isinstance(layer, ExportedNorm)]
    try:
        module(images)
    finally:
        for hook in hooks:
            hook.remove()
    for norm, layer in layers.items():
        if isinstance(layer, ExportedNorm):
            _make_ordinary(layer, norm.ordinary_class, *seen[layer])


def _make_ordinary(layer: Any, kind: type[nn.Module], mean: Tensor, var: Tensor) -> None:
    for name in ("source_mean", "source_var", "share", "images"):
        layer._buffers.pop(name, None)
    layer = become(layer, kind)
    layer.track_running_stats = True
    for name, value in zip(_RUNNING, (mean, var, torch.zeros((), dtype=torch.int64, device=mean.device)), strict=True):
        layer.register_buffer(name, value)
