"""Finite-value checks that share the step's host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Guard", "is_finite"]


class Guard:
    """Checks that pixels, weights and statistics are finite.

    The checks of a batch are scalars on the device. They are read together with the numbers that the first step of the
    batch reads anyway, or when the batch ends.
    """

    def __init__(self) -> None:
        #: Whether the pixels of the present batch are finite; None until they are read.
        self.pixels_finite: bool | None = None
        #: Whether weights and statistics were finite before the present batch.
        self.state_finite = True
        #: Whether a step has moved the weights since they were last checked.
        self.moved = False
        self._unread: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._others: list[Tensor] = []

    def watch(self, weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Set what must stay finite.

        Args:
            weights: Tensors that steps alone move.
            others: Tensors that also move where no step does; those that are not finite now are left out.
        """
        self._weights = [value for value in weights if value.numel() and bool(value.isfinite().all())]
        self._others = [
            value for value in others if value.is_floating_point() and value.numel() and bool(value.isfinite().all())
        ]

    def begin(self, images: Tensor) -> None:
        """Begin a batch.

        Args:
            images: (B, C, H, W), as they came.
        """
        low, high = images.detach().aminmax()
        self._unread = [(low - low + (high - high)).float()]  # 0 or NaN
        self.pixels_finite, self.state_finite = None, True
        watched = [*self._weights, *self._others] if self.moved else self._others
        if watched:
            self._unread.append(_size(watched))

    def read(self, values: Sequence[Tensor] = ()) -> list[float]:
        """Return numbers from the device, and note the checks that were not read yet; one host synchronisation.

        Args:
            values: Scalars.
        """
        unread, self._unread = self._unread, []
        scalars = [*values, *unread]
        if not scalars:
            return []
        seen: list[float] = [scalars[0].item()] if len(scalars) == 1 else torch.stack(scalars).tolist()
        if unread:
            checks = seen[len(values) :]
            self.pixels_finite = is_finite(checks[0])
            self.state_finite = all(map(is_finite, checks[1:]))
            self.moved = self.moved and not self.state_finite
        return seen[: len(values)]

    def check_state(self) -> bool:
        """Return whether weights and statistics are finite; one host synchronisation where they may not be."""
        watched = [*self._weights, *self._others] if self.moved else self._others
        finite = not watched or is_finite(float(_size(watched)))
        self.moved = self.moved and not finite
        return finite


def is_finite(value: float) -> bool:
    """Return whether a number is neither infinite nor NaN."""
    return value - value == 0


@torch.no_grad()
def _size(tensors: Sequence[Tensor]) -> Tensor:
    """Return a number that is finite if all of these are."""
    vectors = [tensor for tensor in tensors if tensor.ndim == 1]
    others = [tensor for tensor in tensors if tensor.ndim != 1]
    norms = [torch.linalg.vector_norm(torch.cat(vectors)).float()] if vectors else []
    if others:
        norms += [norm.float() for norm in torch._foreach_norm(others)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum()
