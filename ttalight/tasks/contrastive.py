"""Self-supervised source training by SimCLR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttalight.tasks.two_view import TwoViewTask

__all__ = ["ContrastiveTask"]


class ContrastiveTask(TwoViewTask):
    """A self-supervised model pi(g(x)) trained by comparing two views of each image.

    Second part of the first stage of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*,
    arXiv 2507.05221; its temperature is 0.01. The projector is one linear layer that keeps the dimension, so that the
    aligned projection can stand where the supervised features stood. That method takes any self-supervised loss:
    ``objective="barlow_twins"`` is another one, and the stages that start from the file use it as well.

    Args:
        symmetric: Whether both views are anchors; ``false`` is the paper's Eq. 1 to the letter, with the first view
            alone. The expected gradient is the same up to scale, its variance is not.
        kwargs: See ``TwoViewTask`` and ``BaseTask``.
    """

    def __init__(self, symmetric: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.symmetric = symmetric

    def forward(self, images: Tensor) -> Tensor:
        """Return pi(g(x)), (B, D), of images in [0, 1], (B, 3, H, W)."""
        return self.project(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the self-supervised loss of two fresh views; None skips a batch of one image that was left over."""
        if self.is_rest(batch[0], batch_idx):
            return None
        loss = self.contrast(self.views(batch[0], self.draws))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the self-supervised loss of two views that are the same in every epoch."""
        images = batch[0]
        if len(images) < 2:
            return  # a single image has nothing to be told from
        generator = torch.Generator(device=images.device).manual_seed(batch_idx)
        loss = self.contrast(self.views(images, generator))
        self.log("val/loss", loss, batch_size=len(images), prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return pi(g(x)), (B, D)."""
        features: Tensor = self(batch[0])
        return features
