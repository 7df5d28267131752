"""Features of lowest entropy for each class, as they are after every single image of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ClassCache", "places_along_batch"]


class ClassCache:
    """Keeps the M unit features of lowest entropy for each class, in tensors of one size; no host synchronisation.

    A whole batch is processed at once, and each image reads what the cache holds after that image, as if they came one
    by one.

    Args:
        like: A tensor of the features' type and device, (C, D).
        size: M.
        marked: Whether each feature comes with marks of its own, boolean (C,). Otherwise it stands for its class.
    """

    def __init__(self, like: Tensor, size: int, marked: bool = False) -> None:
        classes, width = like.shape
        self.features = like.new_zeros(classes, size, width)
        self.entropies = like.new_full((classes, size), torch.inf)
        self.marks = torch.zeros(classes, size, classes, dtype=torch.bool, device=like.device) if marked else None

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that change in place."""
        marks = {} if self.marks is None else {"marks": self.marks}
        return {"features": self.features, "entropies": self.entropies} | marks

    def read(self, features: Tensor, sharpness: float) -> Tensor:
        """Return how similar features are to those of each class, (B, C); see ``follow``."""
        weights = _similarities(features, self.features.flatten(0, 1), self.entropies.flatten() < torch.inf, sharpness)
        return self._by_class(weights, None)

    def follow(
        self, features: Tensor, classes: Tensor, entropies: Tensor, sharpness: float, marks: Tensor | None = None
    ) -> Tensor:
        """Insert features one after another, and return what each one reads from then on, (B, C).

        It is the sum of exp(-sharpness (1 - cosine)) over the features of a class, or over those that mark the class.

        Args:
            features: Unit vectors, (B, D).
            classes: Class that each belongs to, (B,).
            entropies: (B,). Those that are infinite are not inserted.
            sharpness: Of the similarity.
            marks: (B, C), if the cache has marks.
        """
        places = places_along_batch(self.entropies, classes, entropies)
        vectors = torch.cat([self.features.flatten(0, 1), features])
        weights = _similarities(features, vectors, places < self.entropies.shape[1], sharpness)
        sums = self._by_class(weights, classes if marks is None else marks)
        count, size = self.entropies.shape
        owners = torch.cat([torch.arange(count, device=classes.device).repeat_interleave(size), classes])
        # What has no place goes to one place too many, which is cut off.
        target = torch.where(places[-1] < size, owners * size + places[-1], count * size)
        new = {"features": features, "entropies": entropies} | ({} if marks is None else {"marks": marks})
        for name, kept in self.state.items():
            fill = torch.inf if name == "entropies" else 0
            values = torch.cat([kept.flatten(0, 1), new[name].to(kept.dtype)])
            moved = kept.new_full((count * size + 1, *kept.shape[2:]), fill).index_copy_(0, target, values)
            kept.copy_(moved[:-1].view_as(kept))
        return sums

    def _by_class(self, weights: Tensor, new: Tensor | None) -> Tensor:
        """Return the sums of weights over what stands for each class, (B, C).

        Args:
            weights: (B, C * M), or (B, C * M + B) with new features.
            new: Their classes, (B,), or their marks, (B, C).
        """
        count, size = self.entropies.shape
        old, rest = weights[:, : count * size], weights[:, count * size :]
        if self.marks is None:
            sums = old.reshape(-1, count, size).sum(2)
            stands = None if new is None else new[:, None] == torch.arange(count, device=new.device)
        else:
            sums, stands = old @ self.marks.flatten(0, 1).to(old.dtype), new
        return sums if stands is None else sums + rest @ stands.to(rest.dtype)


def places_along_batch(kept: Tensor, classes: Tensor, entropies: Tensor) -> Tensor:
    """Return the place of each feature among those of its class after every image of a batch, (B, C * M + B).

    Place 0 has the lowest entropy; of equal ones the earlier feature comes first. M and more is no place in the cache,
    and features that are not there, or not yet there, have it.

    Args:
        kept: Entropies of the cache, (C, M), ascending, infinite where there is no feature.
        classes: Class of each image, (B,).
        entropies: Of each image, (B,), infinite for those that are not inserted.
    """
    count, size = kept.shape
    order = torch.arange(len(classes), device=kept.device)
    owners = torch.cat([torch.arange(count, device=kept.device).repeat_interleave(size), classes])
    values = torch.cat([kept.flatten(), entropies])
    arrival = torch.cat([order.new_full((count * size,), -1), order])
    ties = (entropies[:, None] == values) & (order[:, None] < arrival)
    beats = (classes[:, None] == owners) & ((entropies[:, None] < values) | ties)
    ahead = (kept[classes] <= entropies[:, None]).sum(1)
    places = torch.cat([torch.arange(size, device=kept.device).repeat(count), ahead]) + beats.cumsum(0)
    is_there = (values < torch.inf) & (arrival <= order[:, None])
    return places.masked_fill(~is_there, size)


def _similarities(features: Tensor, keys: Tensor, present: Tensor, sharpness: float) -> Tensor:
    """Return exp(-sharpness (1 - cosine)) of features and of the keys that are present, 0 for others, (B, K)."""
    return (sharpness * (features @ keys.T - 1)).exp().masked_fill(~present, 0)
