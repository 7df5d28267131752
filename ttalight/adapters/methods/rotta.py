"""RoTTA: a student and an averaged teacher that are updated on a memory of recent, certain images of all classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.components.teacher import Teacher
from ttalight.adapters.memory_training import MemoryAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import entropy, symmetric_cross_entropy
from ttalight.models.batch_statistics import normalize_by_moved
from ttalight.models.network import Outputs
from ttalight.models.norm import NormLayer
from ttalight.transforms import RandomJitterAffineFlip

__all__ = ["RoTTA"]


class RoTTA(MemoryAdapter):
    """Updates on a class-balanced memory of the stream, for streams whose classes come together and domains change.

    A teacher, the running mean of the weights, predicts every batch with running statistics of its own, so that a
    prediction does not depend on the other images of its batch. N images of the stream are kept in a memory, of each
    predicted class at most N / C, rounded up; those with the highest scores leave it first. The score of an image is
    ``timeliness`` / (1 + exp(-age / N)) + ``uncertainty`` H / ln C, with H the entropy of the teacher's prediction and
    the age in images. After every N images there is an update on the memory: the loss of an image is the cross-entropy
    of the student's prediction of the augmented image to the teacher's of the image, times
    exp(-age / N) / (1 + exp(-age / N)). Then the teacher moves towards the student. In both passes BatchNorm layers
    move their running statistics by ``alpha`` towards those of the memory and normalise by the moved ones (RobustBN);
    student and teacher have statistics of their own. Networks without BatchNorm are adapted as they are.

    A batch costs one forward, and for every N images two forwards and one backward of the images in the memory: three
    and one in all once it holds N. Updates fall within a batch; all its predictions are from before it. An update waits
    for the device once more until the memory is full. There are N images and a copy of the trainable weights and of the
    statistics. No window is needed for single images.

    Source: L. Yuan, B. Xie, S. Li, *Robust Test-Time Adaptation in Dynamic Scenarios*, CVPR 2023, arXiv 2303.13899.
    Settings are those of the authors' code for CIFAR (``published``), which does not reset: ``reset="never"``.
    Differences to it: images are inserted in the memory N at a time, see ``BalancedMemory``; augmentations are drawn
    for each image, not once for the memory; entropies are exact, without an offset of 1e-6; the teacher follows the
    weights that adapt, since the others never move; and GroupNorm and LayerNorm adapt too.

    Args:
        memory: See ``MemoryAdapter``.
        alpha: Share of the memory's statistics in each move of the running ones, in [0, 1].
        teacher_momentum: Share of the teacher that stays in each update, in [0, 1].
        timeliness: Factor of the age in the score, at least 0.
        uncertainty: Factor of the entropy in the score, at least 0.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``MemoryAdapter``.

    Raises:
        ValueError: If an argument is out of range; see ``MemoryAdapter`` for networks and images.
    """

    norm = "robust"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 64},
        "imagenet": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 64},
    }

    def __init__(
        self,
        memory: int = 64,
        alpha: float = 0.05,
        teacher_momentum: float = 0.999,
        timeliness: float = 1.0,
        uncertainty: float = 1.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory=memory, **kwargs)
        for name, value in {"alpha": alpha, "teacher_momentum": teacher_momentum}.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {value}")
        for name, value in {"timeliness": timeliness, "uncertainty": uncertainty}.items():
            if value < 0:
                raise InputError(f"{name} must be at least 0, got {value}")
        check_normalization(mean, std)
        self.alpha, self.teacher_momentum = alpha, teacher_momentum
        self.timeliness, self.uncertainty = timeliness, uncertainty
        self.mean, self.std = mean, std
        self._augmentation = RandomJitterAffineFlip.with_blur_and_noise()
        self._space = PixelSpace()
        #: Logits of the teacher for the images in the memory, (K, C).
        self._targets = torch.empty(0)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters and the normalisation, and begin with the source and an empty memory."""
        super().configure(net)
        self._teacher = Teacher(net, self._layers)
        self._space = pixel_space(net, self.mean, self.std)
        self._largest_entropy = math.log(max(2, int(net.possible_classes.sum())))

    def method_state(self) -> dict[str, Tensor]:
        """Return the statistics of the student, the memory and the teacher."""
        return super().method_state() | self._teacher.state()

    def normalize(self, layer: NormLayer, x: Tensor) -> Tensor:
        """Normalise by running statistics, in an update by moved ones; see ``normalize_by_moved``."""
        module: Any = layer.module
        if layer.mode != "source" and x.numel() != x.shape[1]:
            return normalize_by_moved(x, module, self.alpha, moves=not layer.passes.repeating)
        mean, var = module.running_mean, module.running_var
        return F.batch_norm(x, mean, var, module.weight, module.bias, False, 0.0, module.eps)

    def values(self, net: AdaptiveNetwork, logits: Tensor) -> Tensor:
        """Return the entropies of the predictions."""
        return entropy(logits)

    def score(self, values: Tensor, ages: Tensor) -> Tensor:
        """Return the weighted sum of age and entropy, each as a number up to 1."""
        age = (ages / self.memory).sigmoid()
        return self.timeliness * age + self.uncertainty / self._largest_entropy * values

    def class_limit(self, net: AdaptiveNetwork) -> int:
        """Return the share of a class in the memory, rounded up."""
        return math.ceil(self.memory / int(net.possible_classes.sum()))

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step on the augmented images, towards the teacher's predictions of the images."""
        with torch.no_grad():
            with self._teacher.active(net):
                self._targets = net(images, norm="ema", batches=self.share(net, images)).logits
            views = self._space.from_pixels(self._augmentation(self._space.to_pixels(images), net.draws(step)))
        try:
            return super().update(net, views, step)
        finally:
            self._targets = torch.empty(0)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the cross-entropy of each prediction to the teacher's, weighted by age."""
        weights = (-self._memory.ages[: len(images)] / self.memory).sigmoid()
        return symmetric_cross_entropy(self._targets, outputs.logits, 1.0) * weights

    def after_step(self, net: AdaptiveNetwork) -> None:
        """Move the teacher towards the student."""
        self._teacher.follow(net, self.teacher_momentum)

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict with the teacher."""
        with self._teacher.active(net):
            return super().predict(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Give a copy of the network the weights and statistics of the teacher; see ``Method.export``."""
        self._teacher.export(net, module)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        own = {"alpha": self.alpha, "teacher_momentum": self.teacher_momentum}
        scores = {"timeliness": self.timeliness, "uncertainty": self.uncertainty}
        return super().protocol() | own | scores | self._space.protocol()
