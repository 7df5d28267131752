"""CoTTA: a student follows an averaged teacher, and some of its weights are restored at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.components.regularization import restore_at_random_
from ttalight.adapters.components.scaled_views import SCALES, mean_over_scales
from ttalight.adapters.components.teacher import Teacher
from ttalight.adapters.self_training import SelfTrainingAdapter, per_image
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import symmetric_cross_entropy
from ttalight.models.network import Outputs, Selection
from ttalight.transforms import RandomJitterAffineFlip

__all__ = ["CoTTA"]


class CoTTA(SelfTrainingAdapter):
    """Trains all weights on the predictions of a teacher, which is the running mean of the weights.

    The loss of an image is the cross-entropy of the student's prediction to the teacher's. Where the source model is
    not sure of a batch, that is where its mean confidence is below ``confidence``, the teacher predicts the mean of the
    logits of augmented images. After each step the teacher moves towards the student, and each weight of the student
    returns to its source value with probability ``restore``. The prediction is the teacher's, from before the step.

    A batch costs one forward of the source, one forward and backward of the student, and one forward of the teacher, or
    ``views`` where the source is not sure. There is a copy of all weights for the teacher. Whether the source is sure
    is read from the device, so that a step waits once more.

    Where the network predicts pixels the views are the images at seven scales and their mirror images, 14 passes of the
    teacher of which the mean probabilities count, and each pixel has the teacher's plain prediction where the source is
    sure of it, and that of the views elsewhere.

    Source: Q. Wang, O. Fink, L. Van Gool, D. Dai, *Continual Test-Time Domain Adaptation*, CVPR 2022, arXiv 2203.13591.
    Settings and optimizers are those of the authors' code (``published``), whose continual streams never reset:
    ``reset="never"``. Differences to it: augmentations are drawn for each image, not once for a batch; the views are
    made only where they are used, as in the authors' code for ImageNet; and the weights of all layers may be restored,
    not only those named ``weight`` or ``bias``. For pixels targets are the teacher's probabilities, and not its
    classes.

    Args:
        confidence: Limit of the source's mean confidence in [0, 1], below which views are averaged. 0 never makes
            views, and needs no pass of the source.
        views: Augmented copies of a batch, at least 1.
        scales: Factors of the images' sides where the network predicts pixels.
        teacher_momentum: Share of the teacher that stays in each step, in [0, 1].
        restore: Probability of a weight to return to its source value after a step, in [0, 1].
        symmetric: Whether the cross-entropy is the mean of both directions.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range.
    """

    published_parameters: Selection = "all"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "cifar100": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200, "confidence": 0.72},
        "imagenet": {
            "optimizer": "SGD", "momentum": 0.9, "nesterov": True, "lr": 0.01, "batch_size": 64,
            "confidence": 0.1, "restore": 0.001, "symmetric": True,
        },
        "cityscapes": {"optimizer": "Adam", "lr": 7.5e-6, "batch_size": 1, "confidence": 0.69},
    }  # fmt: skip

    def __init__(
        self,
        confidence: float = 0.92,
        views: int = 32,
        scales: Sequence[float] = SCALES,
        teacher_momentum: float = 0.999,
        restore: float = 0.01,
        symmetric: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        shares = {"confidence": confidence, "teacher_momentum": teacher_momentum, "restore": restore}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {value}")
        if views < 1:
            raise InputError(f"views must be at least 1, got {views}")
        if not scales or min(scales) <= 0:
            raise InputError(f"scales must be positive numbers, at least one, got {list(scales)}")
        check_normalization(mean, std)
        self.confidence, self.views, self.symmetric = confidence, views, symmetric
        self.scales = tuple(scales)
        self.teacher_momentum, self.restore = teacher_momentum, restore
        self.mean, self.std = mean, std
        self._augmentation = RandomJitterAffineFlip.with_blur_and_noise()
        self._space = PixelSpace()
        #: Logits of the teacher for the present batch, (B, C) or (B, C, H, W).
        self._targets = torch.empty(0)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters and the batch's statistics, and begin with the source as the teacher."""
        super().configure(net)
        self._teacher = Teacher(net)
        self._space = pixel_space(net, self.mean, self.std)

    def method_state(self) -> dict[str, Tensor]:
        """Return the weights of the teacher."""
        return self._teacher.state()

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step, and return the logits of the teacher from before it; see ``SelfTrainingAdapter``."""
        draws = net.draws(step)  # the views, and then what is restored
        self._targets = targets = self._teach(net, images, draws)
        try:
            super().update(net, images, step)
        finally:
            self._targets = torch.empty(0)
        return targets

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the cross-entropy of each prediction to the teacher's."""
        return per_image(symmetric_cross_entropy(self._targets, outputs.logits, 0.5 if self.symmetric else 1.0))

    @torch.no_grad()
    def _teach(self, net: AdaptiveNetwork, images: Tensor, draws: torch.Generator) -> Tensor:
        """Return the logits of the teacher, (B, C) or (B, C, H, W)."""
        is_sure = True
        if self.confidence > 0:
            with net.with_weights(net.source):
                confidences = net(images).logits.softmax(1).amax(1)
            if confidences.ndim > 1:
                return self._teach_pixels(net, images, confidences >= self.confidence)
            is_sure = bool(confidences.mean() >= self.confidence)
        with self._teacher.active(net):
            if is_sure:
                logits = net(images).logits
            else:
                pixels = self._space.to_pixels(images)
                logits = self._passed(net, pixels, draws)
                for _ in range(self.views - 1):
                    logits = logits + self._passed(net, pixels, draws)
                logits = logits / self.views
        return logits

    def _teach_pixels(self, net: AdaptiveNetwork, images: Tensor, is_sure: Tensor) -> Tensor:
        """Return log-probabilities of the teacher, (B, C, H, W), from views where the source is not sure, (B, H, W)."""
        with self._teacher.active(net):
            plain = net(images).logits.log_softmax(1)
            views = mean_over_scales(lambda scaled, share: net(scaled, batches=share).logits, images, self.scales)
        return torch.where(is_sure[:, None], plain, views)

    def _passed(self, net: AdaptiveNetwork, pixels: Tensor, draws: torch.Generator) -> Tensor:
        """Return the logits of augmented images, (B, C)."""
        return net(self._space.from_pixels(self._augmentation(pixels, draws))).logits

    def after_step(self, net: AdaptiveNetwork) -> None:
        """Move the teacher towards the student, and restore weights of the student."""
        self._teacher.follow(net, self.teacher_momentum)
        restore_at_random_(net.parameters, net.source, self.restore, net.generator)

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict with the teacher, without views."""
        with self._teacher.active(net):
            return super().predict(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Give a copy of the network the weights of the teacher; see ``Method.export``."""
        super().export(net, module)
        self._teacher.export(net, module)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        own = {"confidence": self.confidence, "views": self.views, "restore": self.restore}
        return super().protocol() | own | self._space.protocol()
