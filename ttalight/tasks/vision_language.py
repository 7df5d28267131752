"""Classification by the names of classes: an image tower and text features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.models.cosine_classifier import CosineClassifier
from ttalight.models.image_tower import ImageTower
from ttalight.models.patch_tokens import encode_tokens
from ttalight.tasks.base import BaseTask
from ttalight.tasks.classifier_steps import ClassifierSteps
from ttalight.tasks.text_features import class_texts, projection_layer

__all__ = ["VisionLanguageTask"]


class VisionLanguageTask(ClassifierSteps, BaseTask):
    """A vision-language model as a classifier: cosines of image features and of the text features of class names.

    The logits are the scaled products of unit vectors, as in A. Radford et al., *Learning Transferable Visual Models
    From Natural Language Supervision*, ICML 2021, arXiv 2103.00020 (CLIP). The text features stand in ``classifier``,
    so all adapters work on the image tower, and those that read features or the classifier see unit vectors. The text
    tower is not needed. The task is evaluated and adapted; it has no training.

    Args:
        text_features: Text features of the classes, (C, D), of any length; or a file of ``torch.save`` with them, or
            with a dict of ``features`` and ``names``. ``ensemble_text_features`` averages several prompts for a class.
        encoder: Name of a timm backbone, the image tower.
        image_tower: The image tower in Python instead: a module with ``encode_image``, or one that maps normalised
            images to features, (B, D).
        scale: Factor on the cosines.
        projection: Linear map from the features of the image tower to those of the text, (D, features); or a file:
            with it, with a dict of ``weight`` and ``bias``, or a checkpoint of an ``EmbeddingTask``. By default none.
        stem: ``cifar`` fits a ResNet or an EfficientNet to small images, see ``create_encoder``.
        pretrained: ``true`` for timm's weights of the encoder, or a local file.
        kwargs: See ``BaseTask``. ``mean``, ``std`` and ``image_size`` say how images are prepared for a tower that is
            given in Python.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    unsaved_arguments = ("text_features", "image_tower", "projection")

    def __init__(
        self,
        text_features: str | Tensor,
        encoder: str | None = None,
        image_tower: Any = None,
        scale: float = 100.0,
        projection: str | Tensor | None = None,
        stem: Literal["cifar", "imagenet"] = "imagenet",
        pretrained: bool | str = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (encoder is None) == (image_tower is None):
            raise InputError("give either encoder (a name of timm's) or image_tower (a module)")
        if not 0 < scale < float("inf"):
            raise InputError(f"scale must be positive and finite, got {scale}")
        if encoder is not None:
            self.encoder = self.start_encoder(encoder, stem, pretrained)
        else:
            assert image_tower is not None
            self.encoder, self._filled = ImageTower(image_tower), True
            self.hparams.pop("encoder", None)  # results then name the task in its place
        features, self.class_names = class_texts(text_features)
        features = F.normalize(features.to(next(self.encoder.parameters(), features).dtype), dim=1)
        self.num_classes, width = features.shape
        self._tokens: list[Tensor] | None = None
        self.projection: nn.Module = nn.Identity()
        if projection is not None:
            self.projection = projection_layer(projection, width).to(features.dtype)
        self.classifier = CosineClassifier(width, self.num_classes, scale).to(features.dtype)
        self.classifier.load_state_dict({"weight": features})
        if encoder is not None:
            self._check_width(self.encoder.num_features)  # type: ignore[arg-type]

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit vectors, (B, D), of images in [0, 1], (B, 3, H, W)."""
        if self._tokens is None:
            features = self.encode(images)
        else:
            features, tokens = encode_tokens(self.encoder, self.prepare_images(images))
            self._tokens.append(F.normalize(self.projection(tokens), dim=2))
        self._check_width(features.shape[1])
        return F.normalize(self.projection(features), dim=1)

    @contextmanager
    def keep_tokens(self) -> Iterator[list[Tensor]]:
        """Let each pass add the unit vectors of the images' patches, (B, P, D), to a list; see ``encode_tokens``."""
        kept: list[Tensor] = []
        self._tokens = kept
        try:
            yield kept
        finally:
            self._tokens = None

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C), of images in [0, 1], (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.encode_image(images))
        return logits

    def _check_width(self, width: int) -> None:
        reading = self.projection if isinstance(self.projection, nn.Linear) else self.classifier
        expected = reading.in_features
        if width != expected:
            reader = "the projection reads" if isinstance(self.projection, nn.Linear) else "the text features have"
            raise InputError(
                f"the image tower gives {width} features and {reader} {expected}: give a projection (dimension of the "
                "text features, features of the tower), or the tower that belongs to them"
            )
