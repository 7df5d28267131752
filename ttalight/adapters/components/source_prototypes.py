"""Class means of the features of source images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.components.source_images import SourceBatch
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses.similarity import unit_vectors

__all__ = ["nearest_prototypes", "source_prototypes"]


@torch.no_grad()
def source_prototypes(net: AdaptiveNetwork, batches: Iterable[SourceBatch], method: str) -> Tensor:
    """Return the mean feature of each class over source images, (C, D), 0 for a class that no image is of.

    Images are classified by their labels. Those of a batch without labels are of the class that the network predicts
    in the pass that their features are from: with the source weights and the present statistics of its layers.

    Args:
        net: The network, with the source weights, which keeps its features.
        batches: Of the source.
        method: Name of the method, for messages.

    Raises:
        ValueError: If a label is not a class, or the network predicts pixels.
    """
    sums = torch.zeros_like(net.head.weight)
    counts = sums.new_zeros(len(sums))
    for images, given in batches:
        outputs = net(images.to(net.device))
        check_image_predictions(outputs.logits, method, "compares predictions of altered images")
        labels = outputs.logits.argmax(1) if given is None else _checked(given, len(sums)).to(net.device)
        sums.index_add_(0, labels, outputs.vectors.to(sums.dtype))
        counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
    net.drop_outputs()
    return sums / counts.clamp_min(1)[:, None]


@torch.no_grad()
def nearest_prototypes(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the prototype of the largest cosine to each feature, (B, D).

    Args:
        features: (B, D).
        prototypes: (C, D). Those that are 0 are nobody's nearest.
    """
    cosines = unit_vectors(features) @ unit_vectors(prototypes).T
    return prototypes[cosines.masked_fill(~prototypes.any(1), -torch.inf).argmax(1)]


def _checked(labels: Tensor, classes: int) -> Tensor:
    low, high = labels.aminmax()
    if not 0 <= int(low) <= int(high) < classes:
        raise InputError(
            f"the labels of source must be classes of the network, 0 to {classes - 1}, got {int(low)} to {int(high)}: "
            "give images alone where labels are something else"
        )
    return labels
