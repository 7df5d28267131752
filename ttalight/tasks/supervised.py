"""Source training by cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.errors import InputError
from ttalight.models.instance_aware import with_instance_aware_norm
from ttalight.tasks.augmentation import supervised_augmentation
from ttalight.tasks.base import BaseTask
from ttalight.tasks.classifier_steps import ClassifierSteps

__all__ = ["SupervisedTask"]


class SupervisedTask(ClassifierSteps, BaseTask):
    """A classifier h(f(x)) trained by cross-entropy: the source model of every method.

    First stage of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv 2507.05221.
    The works it takes its augmentation from disagree; ``crop="resized"`` (random resized crops) is what the paper's
    unadapted numbers point to, ``"padded"`` is the other one. It changes those numbers by about ten points.

    Args:
        encoder: Name of a timm backbone.
        num_classes: Number of classes C.
        stem: ``cifar`` fits a ResNet or an EfficientNet to small images (3x3, stride 1, no pooling).
        pretrained: ``true`` for timm's weights, or a local file; of the encoder alone.
        weights: File with trained weights: a checkpoint of this task, or a state dict of encoder and classifier under
            the backbone's own names or those of its public files (see ``create_encoder``); ``true`` for timm's.
        crop: ``resized``, ``padded`` or ``none``.
        crop_scale: Range of a resized crop's share of the image.
        padding: Pixels on each side for padded crops.
        flip: Probability of a horizontal flip.
        norm: ``instance_aware`` trains and evaluates with statistics of BatchNorm layers that each image corrects, as
            the sources of NOTE were (``InstanceAwareBatchNorm``); ``batch`` leaves the layers as they are.
        kwargs: See ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    def __init__(
        self,
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        pretrained: bool | str = False,
        weights: bool | str | None = None,
        crop: Literal["resized", "padded", "none"] = "resized",
        crop_scale: Sequence[float] = (0.2, 1.0),
        padding: int = 4,
        flip: float = 0.5,
        norm: Literal["batch", "instance_aware"] = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if norm not in ("batch", "instance_aware"):
            raise InputError(f"norm must be 'batch' or 'instance_aware', got {norm!r}")
        self.num_classes = num_classes
        self.encoder = self.start_encoder(encoder, stem, False if weights else pretrained)
        self.classifier = nn.Linear(self.encoder.num_features, num_classes)  # type: ignore[arg-type]
        if norm == "instance_aware":
            with_instance_aware_norm(self.encoder)
        if weights:
            self.load_classifier(weights, {"encoder": encoder, "num_classes": num_classes, "stem": stem, "norm": norm})
        self.augment = supervised_augmentation(crop, self.crop.size, crop_scale, padding, flip)

    def load_classifier(self, given: bool | str, architecture: dict[str, Any], argument: str = "weights") -> None:
        """Load encoder and classifier from a checkpoint of a ``SupervisedTask``, or from public weights.

        Args:
            given: The file, or true for the weights that timm downloads.
            architecture: Hyper-parameters that must agree with those of a checkpoint.
            argument: The task argument that named the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another class or of another architecture.
            RuntimeError: If timm cannot get the weights.
        """
        checkpoint = self.read_weights(given, argument)
        if "ttalight" in checkpoint:
            same = {name: name for name in ("normalize.", "encoder.", "classifier.")}
            self.load_stage(str(given), argument, "SupervisedTask", same, architecture)
        else:
            self.load_public(checkpoint, given, argument, self.encoder, self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C), of images in [0, 1], (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.encode(images))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of augmented images."""
        images, labels = batch[:2]
        if self.augment is not None:
            images = self.augment(images, self.draws)
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss
