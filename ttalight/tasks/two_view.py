"""The base of the tasks that contrast two views: encoder, projector, views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.losses import barlow_twins_loss, contrastive_loss
from ttalight.tasks.base import BaseTask
from ttalight.transforms import SimCLRViews

__all__ = ["TwoViewTask"]

Objective = Literal["contrastive", "barlow_twins"]


class TwoViewTask(BaseTask):
    """Base of the tasks with a self-supervised encoder g, a linear projector pi and SimCLR's views.

    The views are those of T. Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*,
    ICML 2020, arXiv 2002.05709, as used on CIFAR: random resized crop, flip, colour jitter, greyscale, no blur.

    Args:
        encoder: Name of a timm backbone.
        stem: ``cifar`` fits a ResNet or an EfficientNet to small images (3x3, stride 1, no pooling).
        pretrained: ``true`` for timm's weights, or a local file.
        temperature: Temperature of the contrastive loss, of this stage alone: it does not travel with files, as the
            objective does.
        objective: The self-supervised loss of two views: ``contrastive`` (SimCLR's) or ``barlow_twins`` (without
            negatives and temperature). By default that of the stage that weights come from, else ``contrastive``.
        crop_scale: Range of a crop's share of the image.
        flip: Probability of a horizontal flip.
        jitter: Strength of brightness, contrast, saturation and hue jitter.
        jitter_probability: Probability of colour jitter.
        grayscale: Probability of greyscale.
        blur: Probability of Gaussian blur.
        negatives: Where several processes train: negatives from ``all`` of them, as if they were one, or ``local``
            ones alone.
        kwargs: See ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range.
    """

    #: Whether the contrastive loss takes both views as anchors.
    symmetric: bool = True

    def __init__(
        self,
        encoder: str = "resnet50",
        stem: Literal["cifar", "imagenet"] = "cifar",
        pretrained: bool | str = False,
        temperature: float = 0.01,
        objective: Literal["contrastive", "barlow_twins"] | None = None,
        crop_scale: Sequence[float] = (0.2, 1.0),
        flip: float = 0.5,
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_probability: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 0.0,
        negatives: Literal["all", "local"] = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if temperature <= 0:
            raise InputError(f"temperature must be above 0, got {temperature}")
        if negatives not in ("all", "local"):
            raise InputError(f"negatives must be 'all' or 'local', got {negatives!r}")
        self.negatives = negatives
        if objective is not None:
            _check_objective(objective, "")
        self.temperature = temperature
        self.objective: Objective = objective or "contrastive"
        self._objective_given = objective is not None
        self.encoder = self.start_encoder(encoder, stem, pretrained)
        width: int = self.encoder.num_features  # type: ignore[assignment]
        self.projector = nn.Linear(width, width)
        self.views = SimCLRViews(
            self.crop.size,
            crop_scale,
            flip=flip,
            jitter=jitter,
            jitter_probability=jitter_probability,
            grayscale=grayscale,
            blur=blur,
        )

    def set_image_size(self, size: int | None) -> None:
        """Let the encoder see images, and views, of ``size`` pixels; None shows it images as they come."""
        super().set_image_size(size)
        if "views" in self._modules:
            self.views.size = size

    def project(self, images: Tensor) -> Tensor:
        """Return pi(g(x)), (B, D), of images in [0, 1], (B, 3, H, W)."""
        features: Tensor = self.projector(self.encode(images))
        return features

    def contrast(self, views: Tensor) -> Tensor:
        """Return the self-supervised loss of two views in one tensor, (2B, 3, H, W): a scalar.

        The batch is that of all processes while training on several, unless ``negatives`` says otherwise.
        """
        return self.compare(*self.project(views).chunk(2))

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the self-supervised loss of the projections of two views, (B, D) each: a scalar; see ``contrast``."""
        if self.objective == "barlow_twins":
            return barlow_twins_loss(first, second, gather=self.gathers)
        return contrastive_loss(first, second, self.temperature, symmetric=self.symmetric, gather=self.gathers)

    def is_rest(self, images: Tensor, batch_idx: int) -> bool:
        """Return whether a training batch is one image left over at the end of an epoch, to be skipped.

        One image has no negatives and no statistics, without which any loss here says nothing; two are the fewest that
        do. Where every batch has one image, the first gets the loss's error instead.
        """
        return len(images) == 1 and batch_idx > 0 and not self.gathers

    def load_stage(
        self, path: str, argument: str, task: str, prefixes: Mapping[str, str], architecture: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Load modules from the file of an earlier stage, and take on its objective; see ``BaseTask.load_stage``."""
        checkpoint = super().load_stage(path, argument, task, prefixes, architecture)
        self._take_objective(checkpoint, f"{argument}: {path}: ")
        return checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which task wrote the file, and the objective, for the next stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ttalight"]["objective"] = self.objective

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another task's file, and take on the objective of this task's own."""
        super().on_load_checkpoint(checkpoint)
        self._take_objective(checkpoint, "the checkpoint: ")

    def _take_objective(self, checkpoint: Mapping[str, Any], place: str) -> None:
        objective = checkpoint.get("ttalight", {}).get("objective")
        if objective is not None and not self._objective_given:
            _check_objective(objective, place)
            self.objective = objective

    @property
    def gathers(self) -> bool:
        """Whether negatives come from other processes too."""
        trainer = self._trainer
        several = trainer is not None and trainer.training and trainer.world_size > 1
        return several and self.negatives == "all"


def _check_objective(objective: Any, place: str) -> None:
    if objective not in get_args(Objective):
        raise InputError(f"{place}objective must be one of {', '.join(get_args(Objective))}, got {objective!r}")
