"""Vision-language models on saved embeddings: classification, and training of the projection between the towers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.errors import InputError, InputTypeError
from ttalight.tasks.batches import check_values
from ttalight.tasks.vision_language import VisionLanguageTask

__all__ = ["EmbeddingTask"]


class EmbeddingTask(VisionLanguageTask):
    """Classifies saved image features, (B, D), by text features, and trains the projection between both.

    It is a ``VisionLanguageTask`` whose image tower has run already: methods that read features work on it without
    images and without a network. The data are an ``EmbeddingsDataModule``. ``fit`` trains the projection between towers
    that stay as they are, by the cross-entropy of the scaled cosines over the names of all classes: the image's half
    of CLIP's contrastive loss, where each text counts once however many images of its class are in a batch.

    Locked towers: X. Zhai et al., *LiT: Zero-Shot Transfer with Locked-image text Tuning*, CVPR 2022, arXiv 2111.07991.
    Different from it: the text tower is locked too.

    Args:
        text_features: See ``VisionLanguageTask``; a file of saved embeddings with text features is one too.
        scale: Factor on the cosines.
        projection: See ``VisionLanguageTask``. What ``fit`` starts from.
        features: Dimension of the saved features where the projection starts from random numbers.
        kwargs: See ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit; when training starts without a projection.
        FileNotFoundError: If a file does not exist.
    """

    def __init__(
        self,
        text_features: str | Tensor,
        scale: float = 100.0,
        projection: str | Tensor | None = None,
        features: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            text_features,
            encoder=None,
            image_tower=nn.Identity(),
            scale=scale,
            projection=projection,
            stem="imagenet",
            pretrained=False,
            **kwargs,
        )
        if features is not None:
            if projection is not None:
                raise InputError("give either projection, to start from, or features, to start from random numbers")
            if features < 1:
                raise InputError(f"features must be at least 1, got {features}")
            self.projection = nn.Linear(features, self.classifier.in_features)
        self.classifier.requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Return saved features as they are, (B, D)."""
        return images

    def setup(self, stage: str) -> None:
        """Check the data module against the task.

        Raises:
            ValueError: If ``fit`` has no projection to train, or the data have another number of classes.
        """
        if stage == "fit" and not isinstance(self.projection, nn.Linear):
            raise InputError("there is no projection to train: give one by projection, or the features' dimension")
        self.check_classes(getattr(self.trainer, "datamodule", None))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy over the names of all classes."""
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _check_first(self, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        features = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
            seen = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise InputTypeError(
                f"expected saved features (B, D), got {seen}: use an EmbeddingsDataModule, or for images a "
                "VisionLanguageTask"
            )
        check_values(batch, self.num_classes, unlabelled=True)
