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
        features, values = features[-len(self.features) :], values[-len(self.features) :]
        places = (self.seen + torch.arange(len(features), device=features.device)) % len(self.features)
        self.features.index_copy_(0, places, features.to(self.features.dtype))
        self.values.index_copy_(0, places, values.to(self.values.dtype))
        self.seen += len(features)

    @torch.no_grad()
    def average_of_nearest(self, features: Tensor, count: int) -> Tensor:
        """Return the mean value of the vectors that were added and are nearest to each feature by cosine, (B, ...).

        Args:
            features: (B, D).
            count: Number of vectors; all of the bank where it is smaller. Where fewer were added, the result means
                nothing.
        """
        cosines = unit_vectors(features) @ unit_vectors(self.features).T
        is_added = torch.arange(len(self.features), device=features.device) < self.seen
        nearest = cosines.masked_fill(~is_added, -torch.inf).topk(min(count, len(self.features)), dim=1).indices
        return self.values[nearest].mean(1)
