"""The base of the tasks whose self-supervised loss reads the classifier's own feature maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttalight.models.maps import Stage, capture_maps, parameters_through
from ttalight.tasks.supervised import SupervisedTask

__all__ = ["MapTask"]


class MapTask(SupervisedTask, ABC):
    """Base of the tasks that train a classifier and, on maps of its encoder, a self-supervised loss.

    The losses are added with equal weights. What adapts lies in front of the deepest map.

    Args:
        pretrained: ``true`` for timm's weights, or a local file; not read where ``weights`` bring all.
        weights: Checkpoint of this task; a subclass loads it by ``load_trained`` once it has all its modules.
        crop: ``padded`` crops and flips are what these methods were trained with; see ``SupervisedTask``.
        kwargs: See ``SupervisedTask`` and ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range.
    """

    #: The stages whose maps are read, in order.
    stages: list[Stage]

    def __init__(
        self,
        pretrained: bool | str = False,
        weights: str | None = None,
        crop: Literal["resized", "padded", "none"] = "padded",
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained=pretrained if weights is None else False, crop=crop, **kwargs)

    @abstractmethod
    def training_losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses of source training by name, scalars that are added up.

        Args:
            images: Augmented images in [0, 1], (B, 3, H, W).
            labels: (B,).
        """

    def load_trained(self, path: str | None, *names: str) -> None:
        """Load all weights from a checkpoint of the same class; to be called when all modules are there.

        Args:
            path: The checkpoint; None loads nothing.
            names: Arguments of the task that must agree with the file's, besides encoder, stem and num_classes.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another class or of another architecture.
        """
        if path is None:
            return
        parts = {f"{name}.": f"{name}." for name, module in self.named_children() if module.state_dict()}
        expected = {name: self.hparams[name] for name in ("encoder", "stem", "num_classes", *names)}
        self.load_stage(path, "weights", type(self).__name__, parts, expected)

    def encode_with_maps(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Return features, (B, D), and the stages' maps by number, of images in [0, 1], (B, 3, H, W)."""
        with capture_maps(self.encoder, self.stages) as maps:
            features = self.encode(images)
        return features, maps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of augmented images."""
        images, labels = batch[:2]
        if self.augment is not None:
            images = self.augment(images, self.draws)
        losses = self.training_losses(images, labels)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}_loss": value for name, value in losses.items()})
        return loss

    @abstractmethod
    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the self-supervised loss of test time, a scalar or (B,).

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Source of random draws.
        """

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Return the encoder's parameters from the first layer to the deepest stage whose maps are read."""
        return parameters_through(self.encoder, self.stages[-1])
