"""A bank of recent features, and labels from the nearest of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.losses.similarity import unit_vectors

__all__ = ["FeatureBank"]


class FeatureBank:
    """The last features of a stream, with values of their own, in tensors of one size; no host synchronisation.

    Args:
        features: Vectors to begin with, (K, D), which ``average_of_nearest`` leaves out.
        values: One for each, (K, ...).
    """

    def __init__(self, features: Tensor, values: Tensor) -> None:
        self.features, self.values = features, values
        #: Number of vectors that were added so far.
        self.seen = torch.zeros((), dtype=torch.int64, device=features.device)

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that change in place."""
        return {"features": self.features, "values": self.values, "seen": self.seen}

    @torch.no_grad()
    def add(self, features: Tensor, values: Tensor) -> None:
        """Add vectors in place of the oldest.

        Args:
            features: (B, D). Of more than K the last K are kept.
            values: (B, ...).
        """
        last, size = slice(-len(self.features), None), len(self.features)
        places = ((self.seen + torch.arange(len(features), device=features.device)) % size)[last]
        self.features.index_copy_(0, places, features[last].to(self.features.dtype))
        self.values.index_copy_(0, places, values[last].to(self.values.dtype))
        self.seen += len(features)

    @torch.no_grad()
    def nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and values of the vectors that were added and are nearest to each feature by cosine.

        Args:
            features: (B, D).
            count: Number k of vectors; all of the bank where it is smaller.

        Returns:
            Cosines, (B, k), minus infinity for places without a vector that was added, and values, (B, k, ...).
        """
        cosines = unit_vectors(features) @ unit_vectors(self.features).T
        is_added = torch.arange(len(self.features), device=features.device) < self.seen
        cosines, places = cosines.masked_fill(~is_added, -torch.inf).topk(min(count, len(self.features)), dim=1)
        return cosines, self.values[places]

    def average_of_nearest(self, features: Tensor, count: int) -> Tensor:
        """Return the mean value of ``nearest``, (B, ...). Where fewer were added, the result means nothing."""
        return self.nearest(features, count)[1].mean(1)
