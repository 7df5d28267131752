"""NOTE: statistics corrected for each image, and entropy on a class-balanced memory of the stream."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttalight.adapters.memory_training import MemoryAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.models.exported_norm import ExportedNorm
from ttalight.models.instance_aware import (
    InstanceAwareBatchNorm,
    batch_moments,
    image_moments,
    normalize_instance_aware,
)
from ttalight.models.network import Outputs
from ttalight.models.norm import NormLayer

__all__ = ["NOTE", "InstanceAwareNorm"]


class NOTE(MemoryAdapter):
    """Minimises the entropy on a class-balanced memory of the stream, with statistics that each image corrects.

    BatchNorm layers normalise each image by its own statistics pulled towards the running ones: only what they differ
    by more than ``k`` standard errors is kept (IABN). So a prediction does not depend on the other images of its batch.
    N images of the stream are kept in a memory, as many of each predicted class as possible, those of a class a uniform
    sample of what was seen of it (PBRS). After every N images there is an update on the memory: one step on the mean
    entropy of its predictions, in which layers take the statistics of the memory in the place of the running ones and
    move these towards them by ``momentum``. Networks without BatchNorm are adapted as they are.

    A batch costs one forward, and for every N images one forward and one backward of the images in the memory: two and
    one in all once it holds N. Updates fall within a batch; all its predictions are from before it. An update waits for
    the device once more until the memory is full. No window is needed for single images.

    Source: T. Gong, J. Jeong, T. Kim, Y. Kim, J. Shin, S.-J. Lee, *NOTE: Robust Continual Test-time Adaptation Against
    Temporal Correlation*, NeurIPS 2022, arXiv 2208.05117. Settings are those of the authors' code (``published``). The
    authors train the source with IABN layers, as ``SupervisedTask(norm="instance_aware")`` does. A source with
    BatchNorm layers gets IABN when it adapts, so its numbers differ from theirs. Further differences to their code: the
    memory draws one number for each image, and not a place for each replacement, see ``BalancedMemory``; they predict
    one image after another, so that an update counts from the next image on, not from the next batch on; entropies are
    exact, without an offset of 1e-6, and not divided by the number of classes, on which Adam's steps do not depend; and
    GroupNorm and LayerNorm adapt too.

    Args:
        memory: See ``MemoryAdapter``.
        k: Standard errors by which statistics of an image may differ without being corrected for, at least 0.
        momentum: Share of the memory's statistics in each move of the running ones, in [0, 1].
        kwargs: See ``MemoryAdapter``.

    Raises:
        ValueError: If an argument is out of range; see ``MemoryAdapter`` for networks and images.
    """

    norm = "instance_aware"
    known_layers = (InstanceAwareBatchNorm,)
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-4, "batch_size": 64},
        "imagenet": {"optimizer": "Adam", "lr": 1e-4, "batch_size": 64},
    }

    def __init__(self, memory: int = 64, k: float = 4.0, momentum: float = 0.01, **kwargs: Any) -> None:
        super().__init__(memory=memory, **kwargs)
        if k < 0:
            raise InputError(f"k must be at least 0, got {k}")
        if not 0 <= momentum <= 1:
            raise InputError(f"momentum must lie in [0, 1], got {momentum}")
        self.k, self.momentum = k, momentum

    def normalize(self, layer: NormLayer, x: Tensor) -> Tensor:
        """Normalise by running statistics, in an update by those of the batch, corrected by those of each image."""
        module: Any = layer.module
        with torch.autocast(x.device.type, enabled=False):
            full = x.to(torch.promote_types(x.dtype, torch.float32))
            own = image_moments(full)
            given = module.running_mean, module.running_var
            if layer.mode != "source" and x.numel() != x.shape[1]:
                given = batch_moments(*own, math.prod(x.shape[2:]))
                if not layer.passes.repeating:
                    for value, seen in zip(layer.statistics, given, strict=True):
                        value.lerp_(seen.detach().to(value.dtype), self.momentum)
            return normalize_instance_aware(full, own, given, module, self.k).to(x.dtype)

    def values(self, net: AdaptiveNetwork, logits: Tensor) -> Tensor:
        """Return random numbers, of which the memory keeps the lowest of each class."""
        return torch.rand(len(logits), generator=net.draws(), device=logits.device)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the entropy of each prediction."""
        return outputs.entropies

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Let the BatchNorm layers of a copy of the network correct statistics; see ``Method.export``."""
        for layer in self._layers:
            made = InstanceAwareNorm.of(module.get_submodule(layer.name))
            vars(made).pop("k", None)
            made.register_buffer("k", torch.tensor(self.k, dtype=torch.float64, device=net.device))

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"k": self.k, "momentum": self.momentum}


class InstanceAwareNorm(ExportedNorm):
    """Normalises each image by the source's statistics, corrected by its own where they differ much.

    The buffer ``k`` is the number of standard errors that is not corrected for.
    """

    k: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised."""
        with torch.autocast(x.device.type, enabled=False):
            full = x.to(torch.promote_types(x.dtype, torch.float32))
            return normalize_instance_aware(full, image_moments(full), self.source, self, self.k).to(x.dtype)

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raise a TypeError: the images have no statistics in common."""
        raise InputTypeError("statistics of some images cannot be folded into layers that normalise images singly")
