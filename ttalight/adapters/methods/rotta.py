"""RoTTA: a student and an averaged teacher that are updated on a memory of recent, certain images of all classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.balanced_memory import BalancedMemory, check_call, check_classes
from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.components.teacher import Teacher
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import entropy, symmetric_cross_entropy
from ttalight.models.batch_statistics import normalize_by_moved
from ttalight.models.network import Network, Outputs
from ttalight.models.norm import NormLayer
from ttalight.transforms import RandomJitterAffineFlip

__all__ = ["RoTTA"]


class RoTTA(SelfTrainingAdapter):
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

    A batch costs one forward, and for every N images two forwards and one backward of the images in the memory, at most
    N. Updates fall within a batch; all its predictions are from before it. An update waits for the device once more
    until the memory is full. There are N images and a copy of the trainable weights and of the statistics. No window is
    needed for single images.

    Source: L. Yuan, B. Xie, S. Li, *Robust Test-Time Adaptation in Dynamic Scenarios*, CVPR 2023, arXiv 2303.13899.
    Settings are those of the authors' code for CIFAR (``published``), which does not reset: ``reset="never"``.
    Differences to it: images are inserted in the memory N at a time, see ``BalancedMemory``; augmentations are drawn
    for each image, not once for the memory; entropies are exact, without an offset of 1e-6; the teacher follows the
    weights that adapt, since the others never move; and GroupNorm and LayerNorm adapt too.

    Args:
        memory: Images N that the memory holds, and new ones from one update to the next; at least 1.
        alpha: Share of the memory's statistics in each move of the running ones, in [0, 1].
        teacher_momentum: Share of the teacher that stays in each update, in [0, 1].
        timeliness: Factor of the age in the score, at least 0.
        uncertainty: Factor of the entropy in the score, at least 0.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``SelfTrainingAdapter``. ``steps`` is the number of steps in each update.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network predicts pixel by pixel; later,
            if images have another size than those in the memory.
        TypeError: In ``wrap``, if a BatchNorm layer carries a forward of its own; if the network is called with other
            tensors than the images.
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
        super().__init__(**kwargs)
        if memory < 1:
            raise InputError(f"memory must be at least 1, got {memory}")
        for name, value in {"alpha": alpha, "teacher_momentum": teacher_momentum}.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {value}")
        for name, value in {"timeliness": timeliness, "uncertainty": uncertainty}.items():
            if value < 0:
                raise InputError(f"{name} must be at least 0, got {value}")
        check_normalization(mean, std)
        self.memory, self.alpha, self.teacher_momentum = memory, alpha, teacher_momentum
        self.timeliness, self.uncertainty = timeliness, uncertainty
        self.mean, self.std = mean, std
        self._augmentation = RandomJitterAffineFlip.with_blur_and_noise()
        self._space = PixelSpace()
        #: Logits of the teacher for the images in the memory, (K, C), and the weights of their losses, (K,).
        self._targets = self._weights = torch.empty(0)

    def check(self, net: Network) -> None:
        """Check that there are parameters to adapt, and that the normalisation of BatchNorm layers can be replaced."""
        super().check(net)
        for layer in net.norms:
            if layer.is_batch_norm:
                layer.check_replaceable()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters and the normalisation, and begin with the source and an empty memory."""
        net.set_trainable(net.select(self.parameters))
        self._layers = [layer for layer in net.norms if layer.is_batch_norm and layer.statistics]
        for layer in self._layers:
            layer.replace(partial(self._normalize, layer))
        self._teacher = Teacher(net, self._layers)
        self._space = pixel_space(net, self.mean, self.std)
        classes = int(net.possible_classes.sum())
        self._largest_entropy = math.log(max(2, classes))
        self._memory = BalancedMemory(net, self.memory, self._score, math.ceil(self.memory / classes))

    def method_state(self) -> dict[str, Tensor]:
        """Return the statistics of the student, the teacher and the memory."""
        values = [value for layer in self._layers for value in layer.statistics]
        statistics = {f"statistics.{number}": value for number, value in enumerate(values)}
        return statistics | self._teacher.state() | self._memory.state()

    def _normalize(self, layer: NormLayer, x: Tensor) -> Tensor:
        module: Any = layer.module
        if layer.mode != "source" and x.numel() != x.shape[1]:
            return normalize_by_moved(x, module, self.alpha, moves=not layer.passes.repeating)
        mean, var = module.running_mean, module.running_var
        return F.batch_norm(x, mean, var, module.weight, module.bias, False, 0.0, module.eps)

    def _score(self, entropies: Tensor, ages: Tensor) -> Tensor:
        age = (ages / self.memory).sigmoid()
        return self.timeliness * age + self.uncertainty / self._largest_entropy * entropies

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch, insert it in the memory, and update each time that this is due."""
        name = type(self).__name__
        check_call(net, name)
        logits = self.predict(net, images)
        check_classes(logits, name)
        step = 0
        for kept, ages in self._memory.fill(net, images, logits.argmax(1), entropy(logits)):
            for _ in range(self.steps):
                self._update(net, kept, ages, len(kept) / len(images), step)
                step += 1
        return logits if self.prediction == "before" else self.predict(net, images)

    def _update(self, net: AdaptiveNetwork, images: Tensor, ages: Tensor, batches: float, step: int) -> None:
        """Make one step.

        Args:
            net: The network.
            images: Those in the memory, (K, 3, H, W).
            ages: (K,).
            batches: The images as a share of the batch, for the cost.
            step: Number of the step within the batch, from 0.
        """
        with torch.no_grad():
            with self._teacher.active(net):
                self._targets = net(images, norm="ema", batches=batches).logits
            self._weights = (-ages / self.memory).sigmoid()
            views = self._space.from_pixels(self._augmentation(self._space.to_pixels(images), net.draws(step)))
        try:
            outputs = net(views, norm="ema", batches=batches)
            self.backward(net, self.losses(net, views, outputs), None, outputs)
        finally:
            self._targets = self._weights = torch.empty(0)
        self.optimizer_step(net)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the weighted cross-entropy of each prediction to the teacher's."""
        return symmetric_cross_entropy(self._targets, outputs.logits, 1.0) * self._weights

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
        own = {"memory": self.memory, "alpha": self.alpha, "teacher_momentum": self.teacher_momentum}
        scores = {"timeliness": self.timeliness, "uncertainty": self.uncertainty}
        return super().protocol() | own | scores | self._space.protocol()
