"""Classification by the names of classes: an image tower and text features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.errors import InputError, InputTypeError
from ttalight.models.class_names import class_names_of, templates_of
from ttalight.models.class_prompts import ClassPrompts
from ttalight.models.cosine_classifier import CosineClassifier
from ttalight.models.image_tower import ImageTower
from ttalight.models.open_clip_model import OPEN_CLIP, create_open_clip
from ttalight.models.patch_tokens import encode_tokens
from ttalight.models.text_tower import TextTower
from ttalight.models.two_towers import image_half
from ttalight.tasks.base import BaseTask
from ttalight.tasks.checkpoint import file_sha256
from ttalight.tasks.classifier_steps import ClassifierSteps
from ttalight.tasks.text_features import class_texts, encoded_texts, features_sha256, projection_layer

__all__ = ["VisionLanguageTask"]


class VisionLanguageTask(ClassifierSteps, BaseTask):
    """A vision-language model as a classifier: cosines of image features and of the text features of class names.

    The logits are the scaled products of unit vectors, as in A. Radford et al., *Learning Transferable Visual Models
    From Natural Language Supervision*, ICML 2021, arXiv 2103.00020 (CLIP). The text features stand in ``classifier``,
    so all adapters work on the image tower, and those that read features or the classifier see unit vectors. They are
    given, or computed once from ``class_names``. Then the text tower stays at hand as ``class_prompts``, outside of the
    task's modules: it is no part of its weights, and only methods that encode texts use it. The task is evaluated and
    adapted; it has no training.

    Args:
        text_features: Text features of the classes, (C, D), of any length; or a file of ``torch.save`` with them, or
            with a dict of ``features`` and ``names``. ``ensemble_text_features`` averages several prompts for a class.
        encoder: Name of a timm backbone, the image tower; or ``open_clip/`` and the name of a model of open_clip, with
            both towers.
        image_tower: The image tower in Python instead: a module with ``encode_image``, or one that maps normalised
            images to features, (B, D). With ``class_names`` a model with both towers: of open_clip, a CLIP or SigLIP
            model of transformers, or any with ``encode_image`` and ``encode_text``.
        class_names: Names of the C classes instead of text features; or ``cifar10``, ``cifar100``, ``digits`` or
            ``imagenet`` for those of a set.
        templates: Sentences with ``{}`` in the place of a name, over which text features are averaged; or ``cifar``,
            ``imagenet`` or ``digits`` for those that CLIP's authors publish.
        tokenizer: Maps N texts to tokens; needed with ``class_names`` and ``image_tower``.
        text_cache: Folder of a file with text features for each text tower and list of texts, so that they are not
            computed again.
        scale: Factor on the cosines; by default the model's ``logit_scale``, 100 without one.
        projection: Linear map from the features of the image tower to those of the text, (D, features); or a file:
            with it, with a dict of ``weight`` and ``bias``, or a checkpoint of an ``EmbeddingTask``. By default none.
        stem: ``cifar`` fits a ResNet or an EfficientNet of timm to small images, see ``create_encoder``.
        pretrained: A local file of the encoder's weights; or ``true`` for those that timm downloads, a tag for those of
            open_clip.
        kwargs: See ``BaseTask``. ``mean``, ``std`` and ``image_size`` say how images are prepared for a tower that is
            given in Python. Models that open_clip has created know it themselves.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
        ImportError: If open_clip is needed and not installed.
    """

    classes_advice = "give the names or text features of the {} classes of the data"
    unsaved_arguments = ("text_features", "image_tower", "projection", "tokenizer", "text_cache")

    def __init__(
        self,
        text_features: str | Tensor | None = None,
        encoder: str | None = None,
        image_tower: Any = None,
        class_names: str | list[str] | None = None,
        templates: str | list[str] = "a photo of a {}.",
        tokenizer: Any = None,
        text_cache: str | None = None,
        scale: float | None = None,
        projection: str | Tensor | None = None,
        stem: Literal["cifar", "imagenet"] = "imagenet",
        pretrained: bool | str = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (encoder is None) == (image_tower is None):
            raise InputError("give either encoder (a name of timm's) or image_tower (a module)")
        if (text_features is None) == (class_names is None):
            raise InputError("give either text_features or class_names")
        model, tokenizer = self._make_towers(encoder, image_tower, tokenizer, stem, pretrained, class_names is not None)
        scale = _scale_of(model) if scale is None else scale
        if not 0 < scale < float("inf"):
            raise InputError(f"scale must be positive and finite, got {scale}")
        self.hparams["scale"] = scale
        #: Names, templates and text tower, of all classes. None where text features are given.
        self._prompts: ClassPrompts | None = None
        self.class_names: list[str] | None
        if class_names is not None:
            assert model is not None
            self._prompts = _prompts(model, tokenizer, class_names, templates)
            features, self.text_sha256 = encoded_texts(self._prompts, text_cache)
            self.class_names = self._prompts.names
        else:
            assert text_features is not None
            features, self.class_names = class_texts(text_features)
            self.text_sha256 = features_sha256(features)
        features = F.normalize(features.to(next(self.encoder.parameters(), features).dtype), dim=1)
        self.num_classes, width = features.shape
        self._tokens: list[Tensor] | None = None
        self.projection: nn.Module = nn.Identity()
        if projection is not None:
            self.projection = projection_layer(projection, width).to(features.dtype)
        self.classifier = CosineClassifier(width, self.num_classes, scale).to(features.dtype)
        self.classifier.load_state_dict({"weight": features})
        if model is None:
            self._check_width(self.encoder.num_features)  # type: ignore[arg-type]

    def _make_towers(
        self,
        encoder: str | None,
        model: nn.Module | None,
        tokenizer: Any,
        stem: Literal["cifar", "imagenet"],
        pretrained: bool | str,
        encodes_names: bool,
    ) -> tuple[nn.Module | None, Any]:
        """Make the image tower, and return the model that it is of, None for one of timm, with its tokenizer."""
        if model is not None:
            if not isinstance(model, nn.Module):
                raise InputTypeError(
                    f"image_tower must be a module in Python, got {type(model).__name__}: give the name of a network "
                    "as encoder"
                )
            if hasattr(model, "get_image_features") and not self.preparation.is_given:
                raise InputError(
                    "models of transformers do not say how images are normalised: give mean= and std=, which are "
                    "image_mean and image_std of the model's image processor"
                )
            self.encoder, self._filled = ImageTower(image_half(model) if encodes_names else model), True
            if hasattr(visual := getattr(model, "visual", model), "preprocess_cfg"):  # created by open_clip
                self.take_preprocessing(visual)
            self.hparams.pop("encoder", None)  # results then name the task in its place
            return model, tokenizer
        assert encoder is not None
        if not encoder.startswith(OPEN_CLIP):
            if encodes_names:
                raise InputError(
                    "class_names are encoded by a text tower, which networks of timm do not have: give text_features, "
                    f"a model of open_clip (encoder='{OPEN_CLIP}ViT-B-32'), or a model with both towers as image_tower"
                )
            self.encoder = self.start_encoder(encoder, stem, pretrained)
            return None, tokenizer
        model, own = create_open_clip(encoder.removeprefix(OPEN_CLIP), pretrained)
        self.encoder = ImageTower(image_half(model))
        self.take_preprocessing(model.visual)  # type: ignore[arg-type]
        if isinstance(pretrained, str):
            is_file = Path(pretrained).expanduser().is_file()
            named = pretrained if is_file else f"{encoder}.{pretrained}"
            self.source = {"file": named, "sha256": file_sha256(pretrained) if is_file else None}
        return model, own if tokenizer is None else tokenizer

    @property
    def class_prompts(self) -> ClassPrompts | None:
        """Names, templates and text tower of the classes that the logits are of; None where text features are given."""
        chosen = self._label_space.classes
        if self._prompts is None or chosen is None:
            return self._prompts
        return self._prompts._replace(names=[self._prompts.names[number] for number in chosen])

    def network_protocol(self) -> dict[str, Any]:
        """Return the hash of the text features, which is saved with a result: results with others do not compare."""
        return {"text_features": self.text_sha256[:16]}

    def prepare_images(self, images: Tensor) -> Tensor:
        """Return what the image tower sees, (B, 3, S, S), in the type of its first layer; see ``BaseTask``."""
        prepared = super().prepare_images(images)
        layers = (module for module in self.encoder.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        return prepared if (first := next(layers, None)) is None else prepared.to(first.weight.dtype)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit vectors, (B, D), of images in [0, 1], (B, 3, H, W)."""
        if self._tokens is None:
            features = self.encode(images)
        else:
            features, tokens = encode_tokens(self.encoder, self.prepare_images(images))
            self._tokens.append(F.normalize(self.projection(tokens.to(self.classifier.weight.dtype)), dim=2))
        if features.ndim != 2:
            raise InputError(f"expected features (B, D) of the image tower, got shape {tuple(features.shape)}")
        self._check_width(features.shape[1])
        return F.normalize(self.projection(features.to(self.classifier.weight.dtype)), dim=1)

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


def _scale_of(model: nn.Module | None) -> float:
    scale: Any = getattr(model, "logit_scale", None)
    return float(scale.detach().exp()) if isinstance(scale, Tensor) and scale.numel() == 1 else 100.0


def _prompts(
    model: nn.Module, tokenizer: Any, class_names: str | list[str], templates: str | list[str]
) -> ClassPrompts:
    if not callable(tokenizer):
        raise InputError("class_names and image_tower need tokenizer=, which maps N texts to tokens")
    return ClassPrompts(TextTower(model, tokenizer), class_names_of(class_names), templates_of(templates))
