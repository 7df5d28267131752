"""The passes that the doctor makes: with the source's statistics, the batch's, and mixed ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.adapters import Adapter
from ttalight.doctor.criteria import statistics_distance
from ttalight.engine import AdaptiveNetwork
from ttalight.models.batch_statistics import moments
from ttalight.models.network import Network
from ttalight.models.norm import NormLayer

__all__ = ["Examination"]


class Examination(Adapter):
    """Predicts every batch with the source's statistics (Source), the batch's (PTBN) and mixed ones (AlphaBN).

    The batch's statistics are taken a second time from each quarter of the batch. Nothing is adapted, and a run records
    the predictions of the source model.
    """

    norm = "source"

    def __init__(self) -> None:
        super().__init__(reset="never")
        #: Logits of all images by the statistics that they were computed with, on the host: a list of batches.
        self.logits: dict[str, list[Tensor]] = {name: [] for name in ("source", "batch", "prior", "quarter")}
        #: Distances of a batch's statistics from the running ones: one list a layer, one number a batch.
        self.distances: dict[str, list[Tensor]] = {}
        #: Kinds of the normalisation layers and how many there are of each.
        self.norms: dict[str, int] = {}

    def configure(self, net: AdaptiveNetwork) -> None:
        """Note the normalisation layers."""
        for layer in net.norms:
            kind = "BatchNorm" if layer.is_batch_norm else type(layer.module).__name__
            self.norms[kind] = self.norms.get(kind, 0) + 1

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch in each way, and return the predictions of the source model."""
        with self._watch(net):
            source = net(images).logits
        self._keep("source", source)
        if not any(layer.is_batch_norm for layer in net.norms):
            return source
        self._keep("batch", net(images, norm="batch").logits)
        self._keep("prior", net(images, norm="prior").logits)
        if len(images) >= 4:
            parts = [net(part, norm="batch", batches=0.25).logits for part in images.chunk(4)]
            self._keep("quarter", torch.cat(parts))
        return source

    def check_progress(self, net: AdaptiveNetwork, logits: Tensor) -> None:
        """Warn of nothing, because the report covers it."""

    def _keep(self, name: str, logits: Tensor) -> None:
        self.logits[name].append(logits.cpu())

    @contextmanager
    def _watch(self, net: Network) -> Iterator[None]:
        """Measure how far the inputs of the BatchNorm layers lie from their running statistics."""
        layers = [layer for layer in net.norms if layer.is_batch_norm and len(layer.statistics) == 2]
        handles = [layer.module.register_forward_pre_hook(partial(self._measure, layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _measure(self, layer: NormLayer, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0].float()
        if x.numel() == x.shape[1]:
            return
        mean, var = (value.float() for value in layer.statistics)
        seen = moments(x, [0, *range(2, x.ndim)])
        distance = statistics_distance(mean, var, *seen, eps=float(getattr(module, "eps", 1e-5)))
        self.distances.setdefault(layer.name, []).append(distance.cpu())
