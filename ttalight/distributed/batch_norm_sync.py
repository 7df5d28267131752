"""BatchNorm on statistics of all processes while training, on any device."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ttalight.distributed import global_moments, rank_and_world_size
from ttalight.models.batch_statistics import move_running_statistics, normalized
from ttalight.models.instance_aware import InstanceAwareBatchNorm
from ttalight.models.parts import all_modules

__all__ = ["BatchNormSync"]


class BatchNormSync(LayerSync):
    """Lets the BatchNorm layers of a model normalise with the statistics of all processes' batches in ``fit``.

    Layers on a CUDA device run the function behind ``torch.nn.SyncBatchNorm``. That refuses the CPU, where moments are
    gathered, gradients through them included. Layers stay the objects that they are, only their forward is stood in
    for: fused ones keep their activation, and a checkpoint is that of a model without. In one process, and in eval
    mode, nothing changes. ``ttalight.Trainer`` brings it along unless ``sync_batchnorm`` is false.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Stand in for the forward of every BatchNorm layer."""
        for layer in _batch_norms(model):
            if "forward" not in vars(layer):
                layer.forward = _Forward(layer)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Restore the forward of every layer."""
        for layer in _batch_norms(model):
            if isinstance(vars(layer).get("forward"), _Forward):
                del layer.forward
        return model


class _Forward:
    """The stand-in for one layer's forward."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.own = layer.forward
        self.twin = nn.SyncBatchNorm(layer.num_features, layer.eps, layer.momentum, device="meta")

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not layer.training or rank_and_world_size()[1] == 1:
            result: Tensor = self.own(x)
            return result
        x = self._by_torch(x) if x.is_cuda else self._by_moments(x)
        for name in ("drop", "act"):  # the parts of a fused layer
            if name in layer._modules:
                x = layer._modules[name](x)
        return x

    def _by_torch(self, x: Tensor) -> Tensor:
        twin, layer = self.twin, self.layer
        twin.weight, twin.bias = layer.weight, layer.bias
        twin.track_running_stats = layer.running_mean is not None
        for name in ("running_mean", "running_var", "num_batches_tracked"):  # other objects after a move
            setattr(twin, name, getattr(layer, name))
        normalised: Tensor = twin(x)
        return normalised

    def _by_moments(self, x: Tensor) -> Tensor:
        layer = self.layer
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = global_moments(full)
        if layer.running_mean is not None:
            layer.num_batches_tracked.add_(1)
            momentum = float(1 / layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            move_running_statistics(layer, mean, var, count, momentum)
        return normalized(full, mean, var, layer.weight, layer.bias, layer.eps).to(x.dtype)


def _batch_norms(model: nn.Module) -> list[Any]:
    layers = (module for module in all_modules(model) if isinstance(module, _BatchNorm))
    return [layer for layer in layers if not isinstance(layer, InstanceAwareBatchNorm)]
