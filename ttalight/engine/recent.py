"""The last batches of a run: their logits and times."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["RecentBatches"]

#: Most images, and numbers, that the logits are kept of, and most batches that the times are kept of.
_IMAGES, _NUMBERS, _BATCHES = 1000, 2**22, 100


class RecentBatches:
    """Logits of the last images that were adapted to, in one tensor on the device, and times of their batches."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._times: deque[float] = deque(maxlen=_BATCHES)
        self._next = self._count = 0

    @property
    def logits(self) -> Tensor | None:
        """Logits of up to 1,000 images, (N, C) or (N, C, h, w), in no order; None before the first batch."""
        return None if self._rows is None else self._rows[: self._count]

    @property
    def seconds(self) -> float:
        """Mean time of a batch, 0 before the first."""
        return sum(self._times) / max(1, len(self._times))

    @torch.no_grad()
    def add(self, logits: Tensor, seconds: float) -> None:
        """Add a batch.

        Args:
            logits: (B, C) or (B, C, H, W), of which every eighth row and column is kept.
            seconds: Its time.
        """
        logits = logits if logits.ndim == 2 else logits[:, :, ::8, ::8]
        rows = self._rows
        if rows is None or rows.shape[1:] != logits.shape[1:] or rows.dtype != logits.dtype:
            size = max(1, min(_IMAGES, _NUMBERS // max(1, logits[0].numel())))
            rows = self._rows = logits.new_empty((size, *logits.shape[1:]))
            self._next = self._count = 0
        logits = logits[-len(rows) :]
        fitting = min(len(logits), len(rows) - self._next)
        rows[self._next : self._next + fitting] = logits[:fitting]
        if fitting < len(logits):
            rows[: len(logits) - fitting] = logits[fitting:]
        self._next = (self._next + len(logits)) % len(rows)
        self._count = min(self._count + len(logits), len(rows))
        self._times.append(seconds)
