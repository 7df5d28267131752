"""FIND: normalisation statistics of groups of alike images, mixed with the source's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.adapter import Adapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.models.batch_statistics import moments, normalize_images
from ttalight.models.exported_norm import ExportedNorm
from ttalight.models.network import Network
from ttalight.models.norm import NormLayer

__all__ = ["FIND", "GroupStatistics", "group_dispersion", "group_statistics", "same_group"]


class FIND(Adapter):
    """Normalises every image with statistics of its own kind, for batches that mix domains. Nothing is learned.

    In each chosen BatchNorm layer the images of a batch fall into groups by their channel means (LFD): each image is
    linked with its nearest neighbour in cosine similarity, the connected components are the groups, as many as there
    are. A layer then normalises with ``alpha`` times the source's statistics and 1 - ``alpha`` times the group's
    (FABN). The other layers mix in the statistics of the whole batch, or nothing (S-FABN). One forward a batch, one
    more for the first with ``layers="auto"``; no state from batch to batch.

    Source: Q. Jiang, C. Ye, D. Wei, B. Wang, Y. Xue, J. Jiang, Z. Wang, *Feature-Based Instance Neighbor Discovery:
    Advanced Stable Test-Time Adaptation in Dynamic World*, NeurIPS 2025, arXiv 2506.06782. No code is public. The
    grouping and ``alpha`` are those of the code of its predecessor, *Discover Your Neighbors* (DYN), arXiv 2406.05413.
    How layers are chosen is a reconstruction: the paper's abstract says that there is a choice, not how it is made.

    Args:
        alpha: Share of the source's statistics in [0, 1].
        layers: Which layers divide the batch: ``auto`` for those whose groups differ more than the average layer's on
            the run's first batch, ``all``, or positions among the network's BatchNorm layers.
        others: What the other layers mix in: the statistics of the whole batch (``unified``) or nothing (``source``).
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network has no BatchNorm layer, or none
            of a given position.
    """

    norm = "groups"

    def __init__(
        self,
        alpha: float = 0.8,
        layers: Literal["auto", "all"] | Sequence[int] = "auto",
        others: Literal["unified", "source"] = "unified",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha must lie in [0, 1], got {alpha}")
        named = isinstance(layers, str) and layers in ("auto", "all")
        if not named and not (isinstance(layers, (list, tuple)) and all(type(place) is int for place in layers)):
            raise InputError(f"layers must be 'auto', 'all' or a list of positions, got {layers!r}")
        if others not in ("unified", "source"):
            raise InputError(f"others must be 'unified' or 'source', got {others!r}")
        self.alpha, self.layers, self.others = alpha, layers, others
        self.configured_by_images = layers == "auto"

    def check(self, net: Network) -> None:
        """Check that there are BatchNorm layers with running statistics, whose normalisation can be replaced."""
        if not isinstance(self.layers, str):
            _positions(self.layers, len(net.batch_norms()))
        for layer in net.batch_norms():
            layer.check()
            layer.check_replaceable()
            if not layer.statistics:
                raise InputError(f"layer {layer.name} has no running statistics, and FIND mixes with those")

    def configure(self, net: AdaptiveNetwork) -> None:
        """Stand in for the normalisation of all BatchNorm layers, and choose which divide the batch."""
        layers = net.batch_norms()
        count, device = len(layers), net.device
        self._divides = torch.ones(count, dtype=torch.bool, device=device)
        #: How far apart the groups of each layer are, while layers are chosen.
        self._scores: Tensor | None = None
        if not isinstance(self.layers, str):
            self._divides.zero_()[_positions(self.layers, count)] = True
        for index, layer in enumerate(layers):
            layer.replace(partial(self._normalize, layer, index))
        if self.layers == "auto" and net.images is not None:
            self._scores = torch.zeros(count, device=device)
            with torch.no_grad():
                net(net.images)
            self._divides.copy_(self._scores >= self._scores.mean())
            self._scores = None

    def method_state(self) -> dict[str, Tensor]:
        """Return which layers divide the batch."""
        return {"divides": self._divides}

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict with the statistics of each image's group."""
        with torch.no_grad():
            return net(images).logits

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Let the BatchNorm layers of a copy of the network normalise by groups; see ``Method.export``."""
        for norm, divides in zip(net.batch_norms(), self._divides, strict=True):
            layer = GroupStatistics.of(module.get_submodule(norm.name))
            layer.unified = self.others == "unified"
            layer.register_buffer("divides", divides.clone())
            layer.register_buffer("alpha", torch.tensor(self.alpha, dtype=torch.float64, device=divides.device))

    def _normalize(self, layer: NormLayer, index: int, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            source_mean, source_var = layer.statistics
            if self._scores is not None:
                mean, var = image_moments(x, source_mean.dtype)
                together = same_group(mean)
                self._scores[index] = group_dispersion(group_statistics(mean, var, together)[0], together, source_var)
            divides, unified = self._divides[index], self.others == "unified"
            return normalize_by_groups(x, source_mean, source_var, layer.module, self.alpha, divides, unified)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {"alpha": self.alpha, "layers": self.layers, "others": self.others}


class GroupStatistics(ExportedNorm):
    """Normalises each image with the source's statistics mixed with those of its group, or of the whole batch.

    The buffer ``alpha`` is the source's share, and ``divides`` says whether there are groups. Without these the whole
    batch counts if ``unified``, and the source alone if not.
    """

    alpha: Tensor
    divides: Tensor
    unified: bool

    def normalize(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised."""
        mean, var = self.source
        with torch.autocast(x.device.type, enabled=False):
            return normalize_by_groups(x, mean, var, self, self.alpha.to(mean.dtype), self.divides, self.unified)

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raise a TypeError: groups have no statistics in common."""
        raise InputTypeError("statistics of some images cannot be folded into layers that normalise images by groups")


def normalize_by_groups(
    x: Tensor, source_mean: Tensor, source_var: Tensor, layer: Any, alpha: Any, divides: Tensor, unified: bool
) -> Tensor:
    """Return ``x``, (B, C, *), normalised as ``FIND`` does.

    Args:
        x: The images.
        source_mean: (C,).
        source_var: (C,).
        layer: Has ``weight``, ``bias`` and ``eps``.
        alpha: Share of the source's statistics.
        divides: Whether there are groups, a boolean scalar.
        unified: Whether the statistics of the whole batch take their place where there are none.
    """
    mean, var = group_mean, group_var = image_moments(x, source_mean.dtype)
    if len(x) > 1:
        together = same_group(mean)
        group_mean, group_var = group_statistics(mean, var, together)
        mean, var = group_statistics(mean, var, torch.ones_like(together)) if unified else (mean, var)
    if not unified:
        mean, var = source_mean, source_var
    mean = torch.lerp(torch.where(divides, group_mean, mean), source_mean, alpha).flatten()
    var = torch.lerp(torch.where(divides, group_var, var), source_var, alpha).flatten()
    weight, bias = (None if value is None else value.repeat(len(x)) for value in (layer.weight, layer.bias))
    return normalize_images(x.to(mean.dtype), mean, var, weight, bias, layer.eps).to(x.dtype)


def image_moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return channel means and variances of each image, (B, C) both, of (B, C, *)."""
    return moments((x.flatten(2) if x.ndim > 2 else x[:, :, None]).detach().to(dtype), [2])


def same_group(means: Tensor) -> Tensor:
    """Return which images of a batch belong together, a boolean (B, B): the first partition of FINCH.

    Images are linked if one is the other's nearest neighbour in cosine similarity, or if both have the same one; what
    is connected is a group. S. Sarfraz, V. Sharma, R. Stiefelhagen, *Efficient Parameter-free Clustering Using First
    Neighbor Relations*, CVPR 2019, arXiv 1902.11266. A single image is a group.

    Args:
        means: (B, D).
    """
    size = len(means)
    group = torch.arange(size, device=means.device)
    if size > 1:
        unit = F.normalize(means, dim=1)
        # Images with the same nearest neighbour are connected through it. From neighbour to neighbour, each image of a
        # group reaches the same circle: the least number in it names the group.
        ahead = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1)
        for _ in range(math.ceil(math.log2(size))):  # twice as far each time
            group, ahead = torch.minimum(group, group[ahead]), ahead[ahead]
        group = group[ahead]
    return group[:, None] == group


def group_statistics(mean: Tensor, var: Tensor, together: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's group mean and variance, (B, C) both, from the statistics of the images.

    Args:
        mean: Channel means of the images, (B, C).
        var: Channel variances of the images, (B, C).
        together: Which images share a group, (B, B).
    """
    shares = together.to(mean.dtype)
    shares = shares / shares.sum(1, keepdim=True)
    group_mean = shares @ mean
    # The variance over all pixels of a group is the mean variance within its images and the variance of their means.
    return group_mean, (shares @ (var + mean.square()) - group_mean.square()).clamp_min(0)


def group_dispersion(group_mean: Tensor, together: Tensor, source_var: Tensor) -> Tensor:
    """Return how far apart a layer's groups are: the variance of their means over the source's variance, a scalar.

    Args:
        group_mean: Group mean of each image, (B, C).
        together: Which images share a group, (B, B).
        source_var: (C,).
    """
    once = 1 / together.sum(1, keepdim=True).to(group_mean.dtype)  # so that every group counts once
    groups = once.sum()
    center = (once * group_mean).sum(0) / groups
    spread = (once * (group_mean - center).square()).sum(0) / groups
    return (spread / source_var.clamp_min(torch.finfo(source_var.dtype).tiny)).mean()


def _positions(positions: Sequence[int], count: int) -> list[int]:
    wrong = [position for position in positions if not 0 <= position < count]
    if wrong:
        raise InputError(f"layers names positions {wrong}, and the network has BatchNorm layers 0 to {count - 1}")
    return list(positions)
