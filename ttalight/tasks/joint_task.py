"""Joint source training of a classifier and a self-supervised branch: the Y model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.errors import InputError
from ttalight.tasks.augmentation import supervised_augmentation
from ttalight.tasks.contrastive_ttt import ContrastiveTTT

__all__ = ["JointTask"]


class JointTask(ContrastiveTTT):
    """One encoder with a classifier and a projector, trained by cross-entropy and a contrastive loss together.

    The Y model that S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv 2507.05221,
    compare alignment with: same encoder, same projector, same two losses, but one network and no alignment. At test
    time the contrastive loss adapts encoder and projector; the frozen classifier reads the encoder, not the projector.
    Weights of the losses are not stated; here they are 1 and 1. Nor is what they see: here the cross-entropy has the
    images of supervised training, in a forward of their own, the contrastive loss two SimCLR views in another.

    Training on the budget of that paper (50 epochs of batches of 256, pretrained weights) needs ``pretrained`` and
    the defaults of ``BaseTask``; on a longer one, ``optimizer``, ``scheduler`` and the trainer's ``max_epochs``.

    Args:
        encoder: Name of a timm backbone.
        num_classes: Number of classes C.
        stem: ``cifar`` fits a ResNet or an EfficientNet to small images (3x3, stride 1, no pooling).
        pretrained: ``true`` for timm's weights, or a local file.
        weights: Checkpoint of this task.
        contrastive_weight: Weight of the contrastive loss beside the cross-entropy.
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
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        pretrained: bool | str = False,
        weights: str | None = None,
        contrastive_weight: float = 1.0,
        symmetric: bool = True,
        crop: Literal["resized", "padded", "none"] = "resized",
        crop_scale: Sequence[float] = (0.2, 1.0),
        padding: int = 4,
        flip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        initial = pretrained if weights is None else False
        super().__init__(encoder=encoder, stem=stem, pretrained=initial, crop_scale=crop_scale, flip=flip, **kwargs)
        if contrastive_weight < 0:
            raise InputError(f"contrastive_weight must be at least 0, got {contrastive_weight}")
        self.num_classes = num_classes
        self.contrastive_weight = contrastive_weight
        self.symmetric = symmetric
        self.classifier = nn.Linear(self.encoder.num_features, num_classes)  # type: ignore[arg-type]
        if weights is not None:
            parts = {name: name for name in ("normalize.", "encoder.", "projector.", "classifier.")}
            architecture = {"encoder": encoder, "stem": stem, "num_classes": num_classes}
            self.load_stage(weights, "weights", "JointTask", parts, architecture)
        self.augment = supervised_augmentation(crop, self.crop.size, crop_scale, padding, flip)

    def forward(self, images: Tensor) -> Tensor:
        """Return the classifier's logits of the encoder's features, (B, C), of images in [0, 1], (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.encode(images))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the sum of both losses; None skips a batch of one image that was left over."""
        images, labels = batch[:2]
        if self.is_rest(images, batch_idx):
            return None
        augmented = images if self.augment is None else self.augment(images, self.draws)
        supervised = cross_entropy(self(augmented), labels)
        contrastive = self.contrast(self.views(images, self.draws))
        loss = supervised + self.contrastive_weight * contrastive
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/supervised", supervised)
        self.log("train/contrastive", contrastive)
        return loss
