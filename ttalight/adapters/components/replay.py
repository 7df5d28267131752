"""Source images that are kept in memory, to be passed again while a network adapts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.components.source_images import SourceBatch

__all__ = ["ReplayImages", "labelled_cross_entropy"]

#: Label of an image without one.
_NONE = -100


class ReplayImages:
    """Images of the source in host memory, drawn in batches.

    Args:
        batches: Of the source; images of one size.
    """

    def __init__(self, batches: Iterable[SourceBatch]) -> None:
        kept = [
            (images.cpu(), torch.full((len(images),), _NONE) if labels is None else labels.cpu())
            for images, labels in batches
        ]
        self._images, self._labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
        #: Whether an image has a label.
        self.has_labels = bool((self._labels != _NONE).any())

    def draw(self, count: int, seed: int, device: torch.device) -> SourceBatch:
        """Return a batch of different images, drawn at random; -100 is the label of an image without one.

        Args:
            count: Number of images, at most. There are fewer where fewer are kept.
            seed: Of the draw.
            device: Of the result.
        """
        chosen = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(seed))[:count]
        return SourceBatch(self._images[chosen].to(device), self._labels[chosen].to(device))


def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the images that have a label, 0 where none has.

    Args:
        logits: (B, C).
        labels: Classes, or -100, (B,).
    """
    total = F.cross_entropy(logits, labels, ignore_index=_NONE, reduction="sum")
    return total / (labels != _NONE).sum().clamp_min(1)
