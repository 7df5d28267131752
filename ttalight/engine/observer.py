"""The interface between an engine and what watches its batches."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Observer", "kept_batches"]

#: Images, and numbers, that an engine keeps the logits of.
_IMAGES, _NUMBERS = 4096, 2**22


class Observer(Protocol):
    """Sees every batch that was adapted to, at its end, before its logits are returned."""

    def observe(self, engine: Any, logits: Tensor) -> None:
        """See a batch.

        What it changes in weights and statistics is what the next batch begins with. If it raises, the batch is undone.

        Args:
            engine: The ``Engine``. Weights are those after the batch.
            logits: Of the batch, (B, C) or (B, C, H, W), on the device; not to be changed.
        """


def kept_batches(logits: Tensor | None = None) -> deque[tuple[Tensor, float]]:
    """Return an empty list that holds as many batches of such logits as a report needs; without logits none."""
    if logits is None:
        return deque(maxlen=0)
    return deque(maxlen=max(1, min(_IMAGES // len(logits), _NUMBERS // logits.numel())))
