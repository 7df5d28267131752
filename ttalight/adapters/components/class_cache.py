"""Features of lowest entropy for each class, as they are after every single image of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ClassCache", "places_along_batch", "similarities"]


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
        weights = similarities(features, self.features.flatten(0, 1), sharpness)
        return self._by_class(weights * (self.entropies.flatten() < torch.inf))

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
        places = self.places(classes, entropies)
        read = self.read_present(features, classes, places < self.entropies.shape[1], sharpness, marks)
        self.insert(places[-1], classes, features, entropies, marks)
        return read

    def read_present(
        self, features: Tensor, classes: Tensor, present: Tensor, sharpness: float, marks: Tensor | None = None
    ) -> Tensor:
        """Return what each image of a batch reads from features of the cache and of the batch, (B, C).

        Args:
            features: Unit vectors, (B, D).
            classes: Class of each image, (B,).
            present: Features that each image reads, those of the cache and those of the batch, (B, C * M + B).
            sharpness: Of the similarity.
            marks: (B, C), if the cache has marks.
        """
        count, size = self.entropies.shape
        old, new = present[:, : count * size], present[:, count * size :]
        stands = classes[:, None] == torch.arange(count, device=classes.device) if marks is None else marks
        before = self._by_class(similarities(features, self.features.flatten(0, 1), sharpness) * old)
        return before + (similarities(features, features, sharpness) * new) @ stands.to(features.dtype)

    def _by_class(self, weights: Tensor) -> Tensor:
        """Return the sums of weights, (B, C * M), over the features that stand for each class, (B, C)."""
        if self.marks is None:
            return weights.view(-1, *self.entropies.shape).sum(2)
        return weights @ self.marks.flatten(0, 1).to(weights.dtype)

    def places(self, classes: Tensor, entropies: Tensor) -> Tensor:
        """Return the places of cached and new features after each new one; see ``places_along_batch``."""
        return places_along_batch(self.entropies, classes, entropies)

    def insert(
        self, places: Tensor, classes: Tensor, features: Tensor, entropies: Tensor, marks: Tensor | None = None
    ) -> None:
        """Move the features of the cache and new ones to their places, (C * M + B,), in the classes of the new ones.

        The places are the last row of ``places``, and the other arguments those of ``follow``.
        """
        new = {"features": features, "entropies": entropies, "marks": marks}
        count, size = self.entropies.shape
        slots = torch.arange(count * size + 1, device=classes.device)
        owners = torch.cat([slots[:-1] // size, classes])
        # What has no place goes to one slot too many.
        target = torch.where(places < size, owners * size + places, count * size)
        comes_from = slots.index_copy(0, target, torch.arange(len(target), device=classes.device))
        changing = (classes[:, None] * size + slots[:size]).flatten()
        source = comes_from[changing]
        is_old, given = source < count * size, (source - count * size).clamp_min(0)
        for name, kept in self.state.items():
            values, flat = new[name], kept.view(count * size, *kept.shape[2:])
            assert values is not None
            stays = flat[source.clamp(max=count * size - 1)]
            mask = is_old.view(-1, *[1] * (flat.ndim - 1))
            flat.index_copy_(0, changing, torch.where(mask, stays, values.to(kept.dtype)[given]))


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


def similarities(features: Tensor, keys: Tensor, sharpness: float) -> Tensor:
    """Return exp(-sharpness (1 - cosine)) of unit vectors, (..., B, D), and others, (..., K, D), as (..., B, K)."""
    return (sharpness * (features @ keys.mT - 1)).exp()
