"""Test-time training by contrast and by alignment with the moments of source features: TTT++."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.errors import InputError
from ttalight.losses.moments import MomentAlignment, MomentSummary
from ttalight.seeding import derive_seed, global_seed
from ttalight.tasks.augmentation import supervised_augmentation
from ttalight.tasks.contrastive_ttt import ContrastiveTTT

__all__ = ["TTTPlusPlus"]

#: Temperature that the authors' code divides by: their contrastive loss is multiplied by temperature / 0.07.
_BASE_TEMPERATURE = 0.07


class TTTPlusPlus(ContrastiveTTT):
    """A classifier trained beside SimCLR that adapts by SimCLR and by feature moments kept from the source.

    Y. Liu, P. Kothari, B. van Delft, B. Bellot-Gurlet, T. Mordan, A. Alahi, *TTT++: When Does Self-Supervised
    Test-Time Training Fail or Thrive?*, NeurIPS 2021. Source: (1 - w) times the sum of both views' cross-entropies plus
    w times the contrastive loss of the same views, temperature 0.5, on a projector with one hidden layer. When the
    last epoch ends, mean and covariance of the source's features, at encoder and projector, go into the checkpoint.
    Test: the contrastive loss of two views plus ``MomentAlignment`` at both places, of the images themselves; the
    encoder adapts, classifier and projector stay.

    As in the authors' code the contrastive loss, in training and at test time, is multiplied by temperature / 0.07
    (7.14 at 0.5), which its weights and learning rates were chosen with. A step passes the views, the images and the
    images again, so that running statistics are updated three times as theirs are: the second pass of the images is
    without gradient here, since its features are those of the first.

    The authors' protocol is transductive: up to 500 epochs over a corruption's whole test set, the learning rate and
    the end chosen by its labels. Labels choose nothing here, so that protocol is not offered. By default every batch
    is an episode of its own; ``reset: domain`` with a ``queue`` is the single-pass reading of theirs. For CIFAR-10
    they have batches of 256 and ``queue: 1280``, ``calibration_images: 1536`` (2048 together for CIFAR-100, with
    ``encoder_weight: 5``, ``head_weight: 20`` and a learning rate of 1e-4).

    Their source training is 500 epochs of cross-entropy (``SupervisedTask``, then ``supervised`` here), SGD 0.2 with
    momentum 0.9 and weight decay 1e-4, and 500 joint ones at a learning rate of 1: ``optimizer``, ``scheduler``,
    ``batch_size: 256``. A budget matched to other methods leaves those out and may set ``pretrained``.

    Args:
        encoder: Name of a timm backbone.
        num_classes: Number of classes C.
        stem: ``cifar`` fits a ResNet or an EfficientNet to small images (3x3, stride 1, no pooling).
        pretrained: ``true`` for timm's weights, or a local file.
        supervised: Checkpoint of a ``SupervisedTask`` to start from.
        weights: Checkpoint of this task; not together with ``supervised``.
        temperature: Temperature of the contrastive loss.
        contrastive_weight: Share w of the contrastive loss in training, in [0, 1].
        projection: Dimension of the projector's output.
        encoder_weight: Weight of moment alignment at the encoder's features.
        head_weight: Weight of moment alignment at the projector's output.
        queue: Feature vectors of past batches that join the moments of a batch; 0 for none.
        calibration_images: Batch size for the scale of the distances: how many vectors moments are made of at test
            time, queue included.
        crop: Augmentation of source images before their moments are taken: ``resized``, ``padded`` or ``none``.
        crop_scale: Range of a crop's share of the image, for resized crops and for views.
        padding: Pixels on each side for padded crops.
        flip: Probability of a horizontal flip.
        kwargs: See ``TwoViewTask`` and ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    auxiliary_views = 4

    def __init__(
        self,
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        pretrained: bool | str = False,
        supervised: str | None = None,
        weights: str | None = None,
        temperature: float = 0.5,
        contrastive_weight: float = 0.1,
        projection: int = 128,
        encoder_weight: float = 0.05,
        head_weight: float = 0.2,
        queue: int = 0,
        calibration_images: int = 128,
        crop: Literal["resized", "padded", "none"] = "resized",
        crop_scale: Sequence[float] = (0.2, 1.0),
        padding: int = 4,
        flip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            encoder=encoder, stem=stem, pretrained=pretrained if (supervised or weights) is None else False,
            temperature=temperature, crop_scale=crop_scale, flip=flip, **kwargs,
        )  # fmt: skip
        if supervised is not None and weights is not None:
            raise InputError("give supervised (a model to start training from) or weights (a trained one), not both")
        if not 0 <= contrastive_weight <= 1:
            raise InputError(f"contrastive_weight must lie in [0, 1], got {contrastive_weight}")
        if projection < 1 or calibration_images < 2:
            raise InputError(
                f"projection must be at least 1 and calibration_images at least 2, got {projection} and "
                f"{calibration_images}"
            )
        self.num_classes = num_classes
        self.contrastive_weight = contrastive_weight
        self.calibration_images = calibration_images
        width: int = self.encoder.num_features  # type: ignore[assignment]
        self.classifier = nn.Linear(width, num_classes)
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))  # type: ignore[assignment]
        self.encoder_alignment = MomentAlignment(width, encoder_weight, queue)
        self.head_alignment = MomentAlignment(projection, head_weight, queue)
        parts = {name: name for name in ("normalize.", "encoder.", "classifier.")}
        architecture = {"encoder": encoder, "stem": stem, "num_classes": num_classes}
        if supervised is not None:
            self.load_stage(supervised, "supervised", "SupervisedTask", parts, architecture)
        if weights is not None:
            parts |= {name: name for name in ("projector.", "encoder_alignment.", "head_alignment.")}
            architecture |= {"projection": projection}
            self.load_stage(weights, "weights", "TTTPlusPlus", parts, architecture)
        self.augment = supervised_augmentation(crop, self.crop.size, crop_scale, padding, flip)

    def forward(self, images: Tensor) -> Tensor:
        """Return the classifier's logits of the encoder's features, (B, C), of images in [0, 1], (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.encode(images))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the weighted losses of two views; None skips a batch of one image that was left over."""
        images, labels = batch[:2]
        if self.is_rest(images, batch_idx):
            return None
        features = self.encode(self.views(images, self.draws))
        supervised = 2 * cross_entropy(self.classifier(features), labels.repeat(2))
        first, second = self.projector(features).chunk(2)
        contrastive = self.compare(first, second)
        loss = (1 - self.contrastive_weight) * supervised + self.contrastive_weight * contrastive
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/supervised", supervised)
        self.log("train/contrastive", contrastive)
        return loss

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the self-supervised loss of two views, (B, D) each: a scalar. The contrastive one is scaled."""
        loss = super().compare(first, second)
        return loss * (self.temperature / _BASE_TEMPERATURE) if self.objective == "contrastive" else loss

    # -- the source's moments

    def on_train_epoch_end(self) -> None:
        """Summarise the source before the last checkpoint is written."""
        trainer = self.trainer
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        by_epochs = 0 < epochs <= self.current_epoch + 1
        data: Any = getattr(trainer, "datamodule", None)
        if (by_epochs or 0 < steps <= trainer.global_step or trainer.should_stop) and hasattr(data, "train_set"):
            self.summarize(data)

    @torch.no_grad()
    def summarize(self, data: Any) -> None:
        """Take the moments of a source's features, by weights and statistics as they are.

        Args:
            data: Data module with a ``train_set``.

        Raises:
            ValueError: If there are fewer than four training images.
        """
        images = len(data.train_set)
        size = min(self.calibration_images, images // 2)
        if size < 2:
            raise InputError(f"the moments of a source need at least four training images, got {images}")
        if size < self.calibration_images:
            rank_zero_info(f"Calibration on batches of {size}: {images} training images make no two larger ones")
        order = torch.randperm(images, generator=torch.Generator().manual_seed(derive_seed(global_seed(), "summary")))
        draws = torch.Generator(device=self.device).manual_seed(derive_seed(global_seed(), "summary views"))
        loader = DataLoader(
            data.train_set, size, sampler=order.tolist(), collate_fn=lambda batch: batch, drop_last=True
        )
        summaries = MomentSummary(), MomentSummary()
        training = self.training
        self.eval()
        for batch in loader:
            pixels = data.on_after_batch_transfer((batch[0].to(self.device),), 0)[0]
            features = self.encode(pixels if self.augment is None else self.augment(pixels, draws))
            summaries[0].add(features)
            summaries[1].add(self.projector(features))
        self.train(training)
        self.encoder_alignment.summarize(summaries[0])
        self.head_alignment.summarize(summaries[1])

    # -- test time

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the contrastive loss of two fresh views plus the alignment of the images' moments, a scalar.

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Source of the views' random draws.

        Raises:
            ValueError: If there are no source moments.
        """
        if not self.encoder_alignment.is_summarized:
            raise InputError(
                "these weights have no moments of the source, which training takes at its end: let fit reach its last "
                "epoch, or call summarize(datamodule) before the weights are saved"
            )
        contrastive = super().auxiliary_loss(images, generator)
        features = self.encode(images)
        with torch.no_grad():
            self.encode(
                images
            )  # the authors' pass for the projector: the same features, and another update of the statistics
        aligned: Tensor = self.encoder_alignment(features) + self.head_alignment(self.projector(features))
        return contrastive + aligned

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Return the encoder's parameters."""
        return list(self.encoder.parameters())

    def episode_state(self) -> dict[str, Tensor]:
        """Return the queues."""
        places = {"encoder": self.encoder_alignment, "head": self.head_alignment}
        queues = {f"{place}_queue": alignment.queue for place, alignment in places.items()}
        return queues | {f"{place}_queued": alignment.queued for place, alignment in places.items()}

    def default_adapter(self) -> Adapter:
        """Return the published SGD (0.01, momentum 0.9, for CIFAR-10) with 20 steps a batch, from the source."""
        return TestTimeTraining(steps=20, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9))
