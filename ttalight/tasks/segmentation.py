"""Source training and evaluation of networks that predict the class of each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.labels import VOID
from ttalight.models.outputs import logits_of
from ttalight.models.segmentation import create_segmenter
from ttalight.tasks.base import BaseTask
from ttalight.tasks.checkpoint import load_weights, read_checkpoint, select
from ttalight.tasks.classifier_steps import ClassifierSteps
from ttalight.transforms import RandomResizedCropFlipMaps

__all__ = ["SegmentationTask"]


class SegmentationTask(ClassifierSteps, BaseTask):
    """A network that predicts the class of each pixel, trained by cross-entropy.

    Logits of a lower resolution than the images are scaled to theirs, bilinearly.

    Args:
        network: Name of a network of ``torchvision.models.segmentation`` or of timm; see ``create_segmenter``. Or a
            module of your own that maps normalised images (B, 3, H, W) to logits (B, C, h, w), alone or as ``out`` or
            ``logits`` of a dict. It is not saved among the arguments of a checkpoint.
        num_classes: Number of classes C, outputs for pixels that do not count included.
        ignore_index: Label of pixels that do not count, in training and evaluation.
        weights: File with trained weights: a checkpoint of this task, or a state dict of the network under its own
            names.
        crop: Side of the random crops that it is trained on, in pixels; the shorter side of the images by default. 0
            trains on the images as they are.
        crop_scale: Range of a crop's share of the image.
        flip: Probability of a horizontal flip.
        kwargs: See ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    unsaved_arguments = ("network",)

    def __init__(
        self,
        network: str | nn.Module = "lraspp_mobilenet_v3_large",
        num_classes: int = 19,
        ignore_index: int = VOID,
        weights: str | None = None,
        crop: int | None = None,
        crop_scale: Sequence[float] = (0.25, 1.0),
        flip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise InputError(f"num_classes must be at least 2, got {num_classes}")
        if crop is not None and crop < 0:
            raise InputError(f"crop must be a number of pixels, or 0 for none, got {crop}")
        self.num_classes = num_classes
        self.ignore_index = self._void = ignore_index
        self.network = create_segmenter(network, num_classes) if isinstance(network, str) else network
        self.augment = None if crop == 0 else RandomResizedCropFlipMaps(crop, crop_scale, flip=flip)
        if weights is not None:
            self._load(weights)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The network, which has no classifier apart."""
        return self.network

    def _load(self, path: str) -> None:
        checkpoint = read_checkpoint(path, "weights")
        if "ttalight" in checkpoint:
            names = {name: name for name in ("normalize.", "network.")}
            self.load_stage(path, "weights", "SegmentationTask", names, {"num_classes": self.num_classes})
        else:
            load_weights(self.network, select(checkpoint, {"": ""}), path, "weights")
            self._note_source(path, self.network)

    def check_classes(self, data: Any) -> None:
        """Check that the network has an output for each class of a data module; it may have one more, for the rest."""
        theirs = getattr(data, "num_classes", None)
        if theirs is not None and theirs > self.num_classes:
            super().check_classes(data)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C, H, W), of images in [0, 1], (B, 3, H, W)."""
        logits = logits_of(self.network(self.prepare_images(images)))
        if logits.ndim != 4:
            raise InputError(
                f"{type(self.network).__name__} returned logits of shape {tuple(logits.shape)}, expected one class a "
                "pixel, (B, C, H, W): use SupervisedTask for a network that classifies images"
            )
        if logits.shape[2:] != images.shape[2:]:
            logits = F.interpolate(logits, size=images.shape[2:], mode="bilinear")
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the pixels that count; 0 where none does."""
        total = F.cross_entropy(logits, labels, ignore_index=self._void, reduction="sum")
        return total / labels.ne(self._void).sum().clamp_min(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of augmented images."""
        images, labels = batch[:2]
        if self.augment is not None:
            images, labels = self.augment(images, labels, self.draws)
        loss = self.loss(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of the pixels that count."""
        images, labels = batch[:2]
        logits = self(images)
        counts = labels.ne(self._void)
        correct = ((logits.argmax(1) == labels) & counts).sum() / counts.sum().clamp_min(1)
        self.log("val/loss", self.loss(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log("val/accuracy", correct, batch_size=len(labels), prog_bar=True, sync_dist=True)
