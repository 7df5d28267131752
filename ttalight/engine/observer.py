"""The interface of observers, to which an engine shows its batches."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Observer", "kept_batches"]

#: Images, and numbers, that an engine keeps the logits of.
_IMAGES, _NUMBERS = 1000, 2**22


class Observer(Protocol):
    """Sees every batch that was adapted to, at its end, before its logits are returned."""

    def observe(self, engine: Any, logits: Tensor) -> None:
        """See a batch.

        The next batch begins with the weights and statistics as this leaves them. If it raises, the batch is undone.

        Args:
            engine: The ``Engine``. Weights are those after the batch.
            logits: Of the batch, (B, C) or (B, C, H, W), on the device. They must not be changed.
        """


def kept_batches(logits: Tensor | None = None) -> deque[tuple[Tensor, float]]:
    """Return an empty deque for as many batches of such logits as a report needs; one of length 0 without logits."""
    if logits is None:
        return deque(maxlen=0)
    return deque(maxlen=max(1, min(_IMAGES // len(logits), _NUMBERS // logits.numel())))
