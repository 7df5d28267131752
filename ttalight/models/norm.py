"""Normalisation layers as adaptation sees them: found by type, with a mode that no train() or eval() changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ttalight.distributed import global_moments
from ttalight.errors import InputError, InputTypeError
from ttalight.models.attaching.attachment import attach_forward, detach_forward
from ttalight.models.attaching.carried_forward import normalize_by
from ttalight.models.attaching.stand_in import StandIn
from ttalight.models.batch_statistics import (
    moments,
    move_running_statistics,
    normalize_by_batch,
    normalize_each,
    normalized,
    with_gradient_layout,
)
from ttalight.models.instance_aware import InstanceAwareBatchNorm
from ttalight.models.passes.batch_shard import BatchShard

__all__ = ["NormLayer", "NormMode", "PassState", "exact_statistics", "find_norms", "preserve_statistics"]

#: ``source``: running statistics. ``batch``: those of the batch, running statistics untouched. ``ema``: those of the
#: batch, which also update the running statistics, as in training. ``alpha``: running and batch statistics mixed, the
#: batch's share being the layer's ``alpha``. ``prior``: the same with a share of n / (n + N) for n images. ``image``:
#: as ``alpha``, with the statistics of each image by itself.
NormMode = Literal["source", "batch", "ema", "alpha", "prior", "image"]

_NORM_TYPES = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass
class PassState:
    """The state of a network's pass in progress.

    Args:
        repeating: Whether it repeats one for its gradient, as checkpointing does: statistics are not updated again.
        shard: The division of passes over processes: statistics are then those of the whole batch.
    """

    repeating: bool = False
    shard: BatchShard | None = None

    @contextmanager
    def repeat(self) -> Iterator[None]:
        """Go backward: whatever passes meanwhile, under checkpointing, passes again."""
        self.repeating = True
        try:
            yield
        finally:
            self.repeating = False


class NormLayer:
    """One normalisation layer of a network, with statistics that adaptation chooses.

    Only layers of the BatchNorm family have statistics to choose; for GroupNorm and LayerNorm every mode is the
    layer's own forward. A BatchNorm layer that sees a single value a channel cannot estimate a variance: it uses its
    running statistics.

    ``attach`` gives the layer a subclass of its own class whose forward is ``forward`` below. Copies and files of an
    attached layer are of the original class. A layer whose instance carries a forward of its own, as offloading hooks
    and profilers set it, keeps that one: its statistics are chosen around it, see ``normalize_by``.

    Args:
        name: Dotted name of the layer in the network.
        module: The layer.
        passes: See ``PassState``.
    """

    def __init__(self, name: str, module: nn.Module, passes: PassState | None = None) -> None:
        self.name = name
        self.module = module
        self.momentum = 0.1
        #: The batch's share in mode ``alpha``; the images N that the source statistics count as in mode ``prior``.
        self.alpha, self.prior = 0.1, 16.0
        #: Whether statistics of a batch are summed up exactly whatever the layout; see ``normalize_by_batch``.
        self.exact = False
        #: State of the current pass, shared with the network's other layers.
        self.passes = PassState() if passes is None else passes
        self._mode: NormMode = "source"
        self._replacement: Callable[[Tensor], Tensor] | None = None
        self._class = type(module)
        self._stand_in: StandIn | None = None
        #: Whether the layer has statistics to choose.
        self.is_batch_norm = isinstance(module, _BatchNorm) or (
            _is_scripted(module) and hasattr(module, "running_mean")
        )
        #: The drop-out and activation of a fused layer.
        self.tail = [part for part in ("drop", "act") if part in module._modules]
        #: The reason why statistics cannot be chosen.
        self.problem = _problem(module)
        if self.is_batch_norm:
            own = getattr(module, "momentum", None)
            self.momentum = 0.1 if own is None else float(own)

    @property
    def mode(self) -> NormMode:
        """The statistics that the layer normalises with.

        Raises:
            TypeError: When set to other statistics than the source's, if the layer computes something of its own.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: NormMode) -> None:
        if mode != "source":
            self.check()
        self._mode = mode

    def check(self) -> None:
        """Check that the statistics of the layer can be chosen.

        Raises:
            TypeError: If it is a BatchNorm that computes something of its own, or of TorchScript.
        """
        if self.problem is not None and not self.replaced:
            raise InputTypeError(f"layer {self.name} is a {self._class.__name__} {self.problem}")

    @property
    def affine(self) -> list[nn.Parameter]:
        """The layer's weight and bias, as far as it has them, or the parameters that these are computed from."""
        found: list[nn.Parameter] = []
        for name in ("weight", "bias"):
            if is_parametrized(self.module, name):
                found += self.module.parametrizations[name].parameters()  # type: ignore[index, union-attr]
            elif isinstance(value := getattr(self.module, name, None), nn.Parameter):
                found.append(value)
        return found

    @property
    def statistics(self) -> list[Tensor]:
        """The running mean and variance, as far as the layer has them."""
        both = (getattr(self.module, "running_mean", None), getattr(self.module, "running_var", None))
        return [buffer for buffer in both if isinstance(buffer, Tensor)]

    @property
    def replaceable(self) -> bool:
        """Whether ``replace`` works: the layer computes what torch.nn's layer of its kind does."""
        if self.carries_forward or self.problem is not None or self.is_batch_norm:
            return not self.carries_forward and self.problem is None
        kind = nn.GroupNorm if isinstance(self.module, nn.GroupNorm) else nn.LayerNorm
        x = _example(self.module)
        with torch.no_grad():
            usual = self._finish(kind.forward(self.module, x))  # type: ignore[arg-type]
            try:
                return torch.allclose(self._class.forward(self.module, x), usual, rtol=1e-2, atol=1e-2)
            except (RuntimeError, IndexError, TypeError):  # it wants other input
                return False

    @property
    def replaced(self) -> bool:
        """Whether the layer normalises by another function; see ``replace``."""
        return self._replacement is not None

    @property
    def ordinary_class(self) -> type[nn.Module]:
        """The class of the layer, without the one of parametrized weights."""
        return self._class.__bases__[0] if is_parametrized(self.module) else self._class

    @property
    def carries_forward(self) -> bool:
        """Whether the instance carries a forward of its own."""
        return "forward" in vars(self.module)

    def attach(self) -> None:
        """Take part in the layer's forward; GroupNorm and LayerNorm compute their own until ``replace``."""
        if self.problem is not None or not isinstance(self.module, (_BatchNorm, nn.GroupNorm)):
            return
        if self.carries_forward and self.is_batch_norm:
            self._stand_in = StandIn(self.module, partial(normalize_by, self.module.forward, self))
        elif not self.carries_forward:
            attach_forward(self.module, self.forward)

    def replace(self, normalize: Callable[[Tensor], Tensor], known: tuple[type[nn.Module], ...] = ()) -> None:
        """Normalise by another function, affine included; drop-out and activation of a fused layer still follow.

        Args:
            normalize: Takes the layer's input; see ``check_replaceable`` for the layers that can have it.
            known: See ``check_replaceable``.
        """
        self.check_replaceable(known)
        self._replacement = normalize
        attach_forward(self.module, self.forward)

    def check_replaceable(self, known: tuple[type[nn.Module], ...] = ()) -> None:
        """Check that ``replace`` works.

        Args:
            known: Classes of layers with a forward of their own that may be replaced too.

        Raises:
            TypeError: If the layer does something else than to normalise over its input's usual dimensions.
        """
        if self.carries_forward or not (isinstance(self.module, known) or self.replaceable):
            raise InputTypeError(
                f"layer {self.name} is a {self._class.__name__} that computes something else than torch.nn's layer of "
                "its kind, or carries a forward of its own, so its normalisation cannot be replaced: use torch.nn's "
                "layer"
            )

    def detach(self) -> None:
        """Restore the layer's own forward."""
        self._replacement, self._mode = None, "source"
        if self._stand_in is not None:
            self._stand_in.end()
            self._stand_in = None
        detach_forward(self.module)

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Normalise temporarily as the source model does: by running statistics, nothing replaced."""
        before = self._mode, self._replacement
        self._mode, self._replacement = "source", None
        try:
            yield
        finally:
            self._mode, self._replacement = before

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Normalise the input in the present mode, then apply drop-out and activation of a fused layer."""
        (x,) = (*args, *kwargs.values())
        if self._replacement is not None:
            x = self._replacement(x)
        elif self.is_batch_norm and self.problem is None:
            x = self._normalize(x, self.module.weight, self.module.bias)
        else:
            own: Tensor = self._class.forward(self.module, with_gradient_layout(x))
            return own
        return self._finish(x) if self.tail else x

    def standardize(self, x: Tensor) -> Tensor:
        """Normalise ``x`` in the present mode, without the layer's weight and bias."""
        layer = self.module
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, None, None, layer.eps)
        if isinstance(layer, nn.LayerNorm):
            return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
        return self._normalize(x, None, None)

    def _finish(self, x: Tensor) -> Tensor:
        for name in self.tail:
            x = self.module._modules[name](x)  # type: ignore[misc]
        return x

    def _normalize(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        layer: Any = self.module
        if self._mode == "batch" and self.passes.shard is None and x.numel() != x.shape[1]:
            if self.exact and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
                return normalize_by_batch(x, weight, bias, layer.eps)
            # The most frequent case. ``F.batch_norm`` would check the shape a second time.
            return torch.batch_norm(x, weight, bias, None, None, True, 0.0, layer.eps, torch.backends.cudnn.enabled)
        mean, var = layer.running_mean, layer.running_var
        batch = mean is None or self._mode != "source"
        shared = self.passes.shard is not None and self.passes.shard.images > 0
        images = self._shared_images(x) if batch and shared else len(x)
        if batch and images * (x.numel() // len(x)) == x.shape[1]:
            if mean is None:
                raise InputError(
                    f"layer {self.name} sees one value a channel and has no running statistics: use more images a batch"
                )
            batch = False
        momentum = 0.0
        if batch and mean is not None and self._mode == "image":
            return normalize_each(x, mean, var, self.alpha, weight, bias, layer.eps)
        if batch and mean is not None and self._mode in ("alpha", "prior"):
            mean, var = self.mixed(x, mean, var, images, shared)
            batch = False
        elif batch and shared:
            return self._by_all(x, weight, bias)
        elif batch and self._mode == "ema":
            momentum = 0.0 if self.passes.repeating else self.momentum
        elif batch:
            mean = var = None
        return F.batch_norm(x, mean, var, weight, bias, batch, momentum, layer.eps)

    def mixed(self, x: Tensor, mean: Tensor, var: Tensor, images: int, shared: bool) -> tuple[Tensor, Tensor]:
        """Return running statistics mixed with those of ``x``, in mode ``alpha`` or ``prior``."""
        share = self.alpha if self._mode == "alpha" else images / (images + self.prior)
        # Mixed statistics are constants to the gradient: running ones cannot carry any.
        x = x.detach().to(mean.dtype)
        if shared:
            seen_mean, seen_var = self._shared_moments(x)[:2]
        else:
            seen_mean, seen_var = moments(x, [0, *range(2, x.ndim)])
        return mean.lerp(seen_mean, share), var.lerp(seen_var, share)

    # -- batches that are divided over processes

    def _shared_images(self, x: Tensor) -> int:
        assert self.passes.shard is not None
        if len(x) != self.passes.shard.rows:
            raise InputError(
                f"layer {self.name} sees {len(x)} rows where the pass has {self.passes.shard.rows} images: "
                "shard='batch' needs one row an image in every BatchNorm layer; use shard='domain'"
            )
        return self.passes.shard.images

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives stay where they are in the order of things
    def _shared_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.passes.shard is not None
        return global_moments(x[: self.passes.shard.valid])

    def _by_all(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        """Normalise with statistics of the whole batch, gradients through these included."""
        layer: Any = self.module
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = self._shared_moments(full)
        if self._mode == "ema" and layer.running_mean is not None and not self.passes.repeating:
            move_running_statistics(layer, mean, var, count, self.momentum)
        return normalized(full, mean, var, weight, bias, layer.eps).to(x.dtype)


def find_norms(network: nn.Module) -> list[NormLayer]:
    """Return the normalisation layers of a network in the order of its modules.

    BatchNorm (timm's fused variants included), GroupNorm and LayerNorm are found by type, wherever they stand.

    Args:
        network: Any module.
    """
    passes = PassState()
    named = network.named_modules()
    return [
        NormLayer(name, part, passes) for name, part in named if isinstance(part, _NORM_TYPES) or _is_scripted(part)
    ]


@contextmanager
def exact_statistics(norms: Sequence[NormLayer]) -> Iterator[None]:
    """Sum statistics of a batch exactly in these layers, temporarily."""
    for norm in norms:
        norm.exact = True
    try:
        yield
    finally:
        for norm in norms:
            norm.exact = False


@contextmanager
def preserve_statistics(norms: Sequence[NormLayer]) -> Iterator[None]:
    """Restore the running statistics on exit.

    Args:
        norms: The layers.
    """
    before = [[value.clone() for value in norm.statistics] for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, statistics in zip(norms, before, strict=True):
                for value, earlier in zip(norm.statistics, statistics, strict=True):
                    value.copy_(earlier)


def _example(layer: Any) -> Tensor:
    """Return a small input for a GroupNorm or LayerNorm: two images, with what is normalised apart in between."""
    shape = (2, layer.num_channels, 2, 2) if isinstance(layer, nn.GroupNorm) else (2, 3, *layer.normalized_shape)
    options = {} if layer.weight is None else {"dtype": layer.weight.dtype, "device": layer.weight.device}
    return torch.linspace(-9, 9, math.prod(shape)).sin().view(shape).to(**options)


def _is_scripted(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer of TorchScript."""
    is_script = isinstance(module, torch.jit.ScriptModule)
    return is_script and (hasattr(module, "running_mean") or module.original_name in ("GroupNorm", "LayerNorm"))


def _problem(module: nn.Module) -> str | None:
    """Return why the statistics of a layer cannot be chosen, None if they can, or if it has none to choose."""
    if _is_scripted(module):
        return "of TorchScript, which cannot be reached: use the nn.Module that the script was made of"
    fused = {"drop", "act"} <= module._modules.keys() and not isinstance(module, InstanceAwareBatchNorm)
    if (
        not isinstance(module, _BatchNorm)
        or fused
        or type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    ):
        return None
    return (
        "with a forward of its own, so its statistics cannot be chosen: use torch.nn's layer, one with 'drop' and "
        "'act' submodules like timm's BatchNormAct2d, or a method that leaves statistics alone (Source, T3A, LAME)"
    )
