"""The evaluation steps of every task that classifies."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["ClassifierSteps"]


class ClassifierSteps(LightningModule):
    """Evaluation steps that call ``self(images)`` once, so that an adapter can stand in for it.

    Metrics of a test are the recorder's; only training's own validation is logged here.
    """

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy."""
        images, labels = batch[:2]
        logits = self(images)
        correct = (logits.argmax(1) == labels).float().mean()
        self.log("val/loss", cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log("val/accuracy", correct, batch_size=len(labels), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Predict; the recorder measures."""
        self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return logits, (B, C)."""
        logits: Tensor = self(batch[0])
        return logits
