"""Finite-value checks that share the step's host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Guard"]


class Guard:
    """Checks that pixels, weights and statistics are finite.

    The checks of a batch are scalars on the device, read with the numbers that the first step of the batch reads
    anyway, or when the batch ends.
    """

    def __init__(self) -> None:
        #: Whether the pixels of the batch are finite, and whether the model was before it. None until they are read.
        self.pixels_finite: bool | None = None
        self.state_finite: bool | None = None
        #: Whether a step has updated the weights since they were last checked.
        self.moved = False
        self._unread: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._others: list[Tensor] = []

    def watch(self, weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Set what must stay finite: weights, updated by steps alone, and others. Those not finite now are left out."""
        self._weights, self._others = (
            [value for value in values if value.is_floating_point() and value.numel() and bool(value.isfinite().all())]
            for values in (weights, others)
        )

    def begin(self, images: Tensor) -> None:
        """Begin a batch, (B, C, H, W)."""
        self._unread = [*images.detach().aminmax()]
        self.pixels_finite = self.state_finite = None

    def check_state(self) -> None:
        """Have weights and statistics checked with the coming read."""
        watched = [*self._weights, *self._others] if self.moved else self._others
        if watched:
            self._unread.append(_sum_of_norms(watched))

    def read(self, values: Sequence[Tensor] = ()) -> list[float]:
        """Return scalars from the device, and note the checks that were not read yet. One host synchronisation."""
        scalars, count = [*values, *self._unread], len(values)
        if not scalars:
            return []
        seen: list[float] = [scalars[0].item()] if len(scalars) == 1 else torch.stack(scalars).tolist()
        if self._unread:
            self._unread = []
            self.pixels_finite = all(map(math.isfinite, seen[count : count + 2]))
            self.state_finite = all(map(math.isfinite, seen[count + 2 :]))
            self.moved = self.moved and not self.state_finite
        return seen[:count]

    def is_pixels_finite(self) -> bool:
        """Return whether the pixels of the batch are finite. One host synchronisation."""
        self.read()
        return self.pixels_finite is True

    def is_state_finite(self) -> bool:
        """Return whether weights and statistics are finite. One host synchronisation where they may not be."""
        unread, self._unread = self._unread, []
        self.check_state()
        checks, self._unread = self._unread, unread
        return all(map(math.isfinite, checks))


@torch.no_grad()
def _sum_of_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return a number that is finite if all of these are."""
    vectors = [tensor for tensor in tensors if tensor.ndim == 1]
    others = [tensor for tensor in tensors if tensor.ndim != 1]
    norms = [torch.linalg.vector_norm(torch.cat(vectors)).float()] if vectors else []
    if others:
        norms += [norm.float() for norm in torch._foreach_norm(others)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum()
