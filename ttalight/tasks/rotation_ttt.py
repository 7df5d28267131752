"""Test-time training by rotation prediction: the method that began this line of work."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.errors import InputError
from ttalight.tasks.augmentation import supervised_augmentation
from ttalight.tasks.base import BaseTask
from ttalight.tasks.classifier_steps import ClassifierSteps
from ttalight.transforms.rotation import check_rotation, rotation_views

__all__ = ["RotationTTT"]


class RotationTTT(ClassifierSteps, BaseTask):
    """A classifier whose encoder also tells how images were turned, and which adapts by that task.

    Y. Sun et al., *Test-Time Training with Self-Supervision for Generalization under Distribution Shifts*, ICML 2020,
    arXiv 1909.13231. The encoder is shared up to a stage; from there a copy of its later stages, with weights of its
    own, ends in four classes. Source: cross-entropy of both tasks, weights 1 and ``rotation_weight``, the second on
    all four rotations of the same augmented images. Test: rotation loss of augmented images, which updates the shared
    stages and the branch; the later stages and the classifier stay.

    The published protocol is one image at a time: ``rotation: random``, ``copies: 32``, ``data.batch_size: 1``, on a
    network with GroupNorm (``encoder: cifar_resnet26_gn``, ``branch: layer2``); online is ``steps: 1`` and ``reset:
    domain``. The defaults are those for whole batches, as the works that compare with it have them. Its source
    training sets ``optimizer`` (SGD, 0.1, momentum 0.9, weight decay 5e-4), ``scheduler`` (a tenth at epochs 75 and
    125 of 150, with BatchNorm 50 and 65 of 75) and ``batch_size: 128``; a budget matched to other methods leaves
    those out.

    Args:
        encoder: Name of a timm backbone whose top-level modules run one after the other, as a ResNet's do.
        num_classes: Number of classes C.
        stem: ``cifar`` fits a ResNet or an EfficientNet to small images (3x3, stride 1, no pooling).
        pretrained: ``true`` for timm's weights, or a local file.
        weights: Checkpoint of this task.
        branch: Name of the last shared stage.
        rotation: ``expand`` for all four rotations of every image, ``random`` for one; in training and adaptation.
        rotation_weight: Weight of the rotation loss in training.
        copies: Augmented copies of each image in a step of adaptation.
        adapt_head: Whether the branch is trained at test time, or only the shared stages.
        crop: Augmentation in training and adaptation: ``padded``, ``resized`` or ``none``.
        crop_scale: Range of a resized crop's share of the image.
        padding: Pixels on each side for padded crops.
        flip: Probability of a horizontal flip.
        kwargs: See ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, the encoder cannot be cut there, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    def __init__(
        self,
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        pretrained: bool | str = False,
        weights: str | None = None,
        branch: str = "layer2",
        rotation: Literal["expand", "random"] = "expand",
        rotation_weight: float = 1.0,
        copies: int = 1,
        adapt_head: bool = True,
        crop: Literal["resized", "padded", "none"] = "padded",
        crop_scale: Sequence[float] = (0.2, 1.0),
        padding: int = 4,
        flip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_rotation(rotation)
        if rotation_weight < 0:
            raise InputError(f"rotation_weight must be at least 0, got {rotation_weight}")
        if copies < 1:
            raise InputError(f"copies must be at least 1, got {copies}")
        self.num_classes = num_classes
        self.rotation: Literal["expand", "random"] = rotation
        self.rotation_weight, self.copies, self.adapt_head = rotation_weight, copies, adapt_head
        self.auxiliary_views = copies * (4 if rotation == "expand" else 1)
        self.encoder = self.start_encoder(encoder, stem, pretrained if weights is None else False)
        width: int = self.encoder.num_features  # type: ignore[assignment]
        self.classifier = nn.Linear(width, num_classes)
        self._shared, later = _cut(self.encoder, encoder, branch)
        self.branch = nn.Sequential(*copy.deepcopy(later), nn.Linear(width, 4))
        if weights is not None:
            parts = {name: name for name in ("normalize.", "encoder.", "classifier.", "branch.")}
            architecture = {"encoder": encoder, "stem": stem, "num_classes": num_classes, "branch": branch}
            self.load_stage(weights, "weights", "RotationTTT", parts, architecture)
        self.augment = supervised_augmentation(crop, self.crop.size, crop_scale, padding, flip)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C), of images in [0, 1], (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.encode(images))
        return logits

    def rotation_logits(self, images: Tensor) -> Tensor:
        """Return the branch's logits of the four rotations, (B, 4), of images in [0, 1], (B, 3, H, W)."""
        maps = self.normalize(self.crop(images))
        for name in self._shared:
            maps = self.encoder.get_submodule(name)(maps)
        logits: Tensor = self.branch(maps)
        return logits

    def rotation_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean cross-entropy of the rotations of images, turned here; a scalar."""
        turned, labels = rotation_views(self.crop(images), self.rotation, generator)
        return cross_entropy(self.rotation_logits(turned).float(), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of classes, and that of rotations, of augmented images."""
        images, labels = batch[:2]
        if self.augment is not None:
            images = self.augment(images, self.draws)
        supervised = cross_entropy(self(images), labels)
        rotation = self.rotation_loss(images, self.draws)
        loss = supervised + self.rotation_weight * rotation
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/supervised", supervised)
        self.log("train/rotation", rotation)
        return loss

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rotation loss of fresh augmented copies of the images, a scalar.

        Args:
            images: (B, 3, H, W) in [0, 1]; a single one will do.
            generator: Source of the copies' random draws.
        """
        images = images.repeat(self.copies, 1, 1, 1)
        if self.augment is not None:
            images = self.augment(images, generator)
        return self.rotation_loss(images, generator)

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the shared stages, and of the branch where that adapts."""
        shared = [p for name in self._shared for p in self.encoder.get_submodule(name).parameters()]
        return [*shared, *self.branch.parameters()] if self.adapt_head else shared

    def default_adapter(self) -> Adapter:
        """Return the published steps: ten of SGD at 1e-3 without momentum, from the source for every batch."""
        return TestTimeTraining(steps=10, optimizer=partial(torch.optim.SGD, lr=1e-3))


def _cut(encoder: nn.Module, name: str, branch: str) -> tuple[list[str], list[nn.Module]]:
    """Return the names of an encoder's modules up to a stage, and the modules behind it.

    Raises:
        ValueError: If there is no such stage, or the encoder does more than to run its modules one after the other.
    """
    names = [child for child, _ in encoder.named_children()]
    if branch not in names:
        raise InputError(f"branch: {name} has no module {branch!r}, it has {', '.join(names)}")
    if not _is_sequence(encoder):
        raise InputError(
            f"{name} does more than to run its modules one after the other, so no branch can leave it at {branch}: "
            "use a ResNet"
        )
    end = names.index(branch) + 1
    return names[:end], [encoder.get_submodule(child) for child in names[end:]]


@torch.no_grad()
def _is_sequence(encoder: nn.Module) -> bool:
    training = encoder.training
    features = images = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    encoder.eval()
    try:
        expected = encoder(images)
        for child in encoder.children():
            features = child(features)
        return expected.shape == features.shape and torch.equal(expected, features)
    except Exception:  # whatever a network says of images that are not for it
        return False
    finally:
        encoder.train(training)
