"""The interface between an engine and what watches its batches."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

__all__ = ["Observer"]


class Observer(Protocol):
    """Sees every batch that was adapted to, at its end, before its logits are returned."""

    def observe(self, engine: Any, logits: Tensor) -> None:
        """See a batch.

        What it changes in weights and statistics is what the next batch begins with. If it raises, the batch is undone.

        Args:
            engine: The ``Engine``. Weights are those after the batch.
            logits: Of the batch, (B, C) or (B, C, H, W), on the device; not to be changed.
        """
