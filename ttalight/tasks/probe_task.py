"""A linear classifier on a frozen self-supervised model, and its test-time training: CTA without alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.errors import InputError
from ttalight.tasks.augmentation import supervised_augmentation
from ttalight.tasks.contrastive_ttt import ContrastiveTTT

__all__ = ["ProbeTask"]


class ProbeTask(ContrastiveTTT):
    """Trains a linear classifier h on the frozen self-supervised model pi(g(x)); at test time adapts g and pi.

    CTA-C, the ablation of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv
    2507.05221, section 5.5: no supervised encoder and no alignment. Test time is that of ``CrossTaskTTT``: two fresh
    views, the objective that g and pi were trained with, at this task's own ``temperature`` (by default 0.01, whatever
    that of training was), h frozen. The paper states neither the schedule of h nor its images; here both are those of
    ``SupervisedTask``, and g and pi stay in eval mode without gradients while h is trained.

    Args:
        self_supervised: Checkpoint of a ``ContrastiveTask``, to train the classifier on.
        weights: Checkpoint of this task, to adapt; not together with ``self_supervised``.
        encoder: Name of a timm backbone.
        num_classes: Number of classes C.
        stem: ``cifar`` fits a ResNet or an EfficientNet to small images (3x3, stride 1, no pooling).
        symmetric: Whether both views are anchors of the contrastive loss; see ``ContrastiveTask``.
        crop: Augmentation for the cross-entropy: ``resized``, ``padded`` or ``none``.
        crop_scale: Range of a crop's share of the image, for resized crops and for views.
        padding: Pixels on each side for padded crops.
        flip: Probability of a horizontal flip.
        kwargs: See ``TwoViewTask`` and ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    def __init__(
        self,
        self_supervised: str | None = None,
        weights: str | None = None,
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        symmetric: bool = True,
        crop: Literal["resized", "padded", "none"] = "resized",
        crop_scale: Sequence[float] = (0.2, 1.0),
        padding: int = 4,
        flip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder=encoder, stem=stem, crop_scale=crop_scale, flip=flip, **kwargs)
        if self_supervised is not None and weights is not None:
            raise InputError(
                "give self_supervised (a model to train the classifier on) or weights (a trained one), not both"
            )
        self.num_classes = num_classes
        self.symmetric = symmetric
        self.classifier = nn.Linear(self.encoder.num_features, num_classes)  # type: ignore[arg-type]
        parts = {name: name for name in ("normalize.", "encoder.", "projector.")}
        architecture: dict[str, Any] = {"encoder": encoder, "stem": stem}
        if self_supervised is not None:
            self.load_stage(self_supervised, "self_supervised", "ContrastiveTask", parts, architecture)
        if weights is not None:
            architecture |= {"num_classes": num_classes}
            self.load_stage(weights, "weights", "ProbeTask", parts | {"classifier.": "classifier."}, architecture)
        self.encoder.requires_grad_(False)
        self.projector.requires_grad_(False)
        self.train()  # the trainer takes the modes as it finds them
        self.augment = supervised_augmentation(crop, self.crop.size, crop_scale, padding, flip)
        self._started = self_supervised is not None or weights is not None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits h(pi(g(x))), (B, C), of images in [0, 1], (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.project(images))
        return logits

    def train(self, mode: bool = True) -> ProbeTask:
        """Set the mode; encoder and projector stay in eval mode."""
        super().train(mode)
        self.encoder.eval()
        self.projector.eval()
        return self

    def setup(self, stage: str) -> None:
        """Make sure that there is a model to train a classifier on."""
        super().setup(stage)
        if stage == "fit" and not self._started:
            raise InputError(
                "the classifier is trained on a self-supervised model: give self_supervised= (checkpoint of a "
                "ContrastiveTask)"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the classifier's cross-entropy on the frozen features of augmented images."""
        images, labels = batch[:2]
        if self.augment is not None:
            images = self.augment(images, self.draws)
        with torch.no_grad():
            features = self.project(images)
        loss = cross_entropy(self.classifier(features), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss
