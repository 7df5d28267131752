"""RMT: a student and its averaged teacher in agreement, features aligned with source prototypes, source replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttalight.adapters.components.replay import ReplayImages, labelled_cross_entropy
from ttalight.adapters.components.source_images import SourceBatch
from ttalight.adapters.components.summed_logits import SummedLogits
from ttalight.adapters.components.teacher import Teacher, network_parameters, parameter_names
from ttalight.adapters.prototype_contrast import PrototypeContrastAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import symmetric_cross_entropy
from ttalight.models.network import Selection
from ttalight.models.vectors import other_values
from ttalight.seeding import derive_seed

__all__ = ["RMT"]


class RMT(PrototypeContrastAdapter):
    """Trains all weights to agree with a teacher in both directions, on source prototypes, and on source images.

    The teacher is the running mean of the student's weights. The loss of an image is the mean of four cross-entropies,
    in both directions, between the teacher's prediction for it and the student's for it and for an augmented copy, and
    the contrastive loss of ``SANTA``. The cross-entropy of the student on as many labelled source images, drawn at
    random, is added. The prediction is the sum of the logits of student and teacher, from before the step.

    Source images are those of ``SANTA``, but kept in host memory. Where none has a label, nothing is replayed. Before
    the first batch the student learns to agree with its teacher on ``warm_up`` source images, in batches as large as
    the first one, at a rate that rises from 0. A reset restores both as they are after that. Without source images
    there are neither warm-up nor replay, and the rows of the classifier stand in for prototypes, with a warning.

    A batch costs one forward of the teacher and three of the student, one of them of source images, with one backward
    through the latter. There are copies of all weights for the teacher and, with a warm-up, for the warm student.

    Source: M. Döbler, R. A. Marsden, B. Yang, *Robust Mean Teacher for Continual and Gradual Test-Time Adaptation*,
    CVPR 2023, arXiv 2211.13081. Settings and optimizers are those of the authors' code (``published``), whose continual
    streams never reset: ``reset="never"``. Differences to it: augmentations are drawn for each image, not once for a
    batch; replayed images are drawn for each batch, from ``source_samples`` of them, not in turn from all; the stream
    begins with a new optimizer, not with that of the warm-up.

    Args:
        source: See ``SANTA``.
        source_samples: Number of source images to keep, at most.
        teacher_momentum: Share of the teacher that stays in each step, in [0, 1].
        replay_weight: Factor of the cross-entropy on source images, at least 0, which is without replay.
        warm_up: Number of source images of the warm-up, at least 0. One that is used twice counts twice.
        kwargs: See ``SANTA``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, as for ``SANTA``.
        TypeError: At the first batch, if ``source`` gives something else than images.
    """

    published_parameters: Selection = "all"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "nesterov": True, "lr": 0.01, "batch_size": 64},
    }
    without_source = (
        "there are neither warm-up nor replay, and the rows of the classifier stand in for the mean features of its "
        "classes"
    )

    def __init__(
        self,
        source: Iterable[Any] | None = None,
        source_samples: int = 5000,
        teacher_momentum: float = 0.999,
        replay_weight: float = 1.0,
        warm_up: int = 50_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, source_samples=source_samples, **kwargs)
        if not 0 <= teacher_momentum <= 1:
            raise InputError(f"teacher_momentum must lie in [0, 1], got {teacher_momentum}")
        if replay_weight < 0:
            raise InputError(f"replay_weight must be at least 0, got {replay_weight}")
        if warm_up < 0:
            raise InputError(f"warm_up must be at least 0, got {warm_up}")
        self.teacher_momentum, self.replay_weight, self.warm_up = teacher_momentum, replay_weight, warm_up
        #: Weights that the student begins with, one tensor for each of the network's.
        self._warm: list[Tensor] = []
        #: Source images; None until they are read. Logits of the teacher and replayed images of the present batch.
        self._replay: ReplayImages | None = None
        self._is_read = False
        self._reference = torch.empty(0)
        self._replayed: SourceBatch | None = None

    # -- before the stream

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters, read source images, and warm student and teacher up."""
        if net.images is not None:
            self._replay, self._is_read = None, False
        super().configure(net)
        self._steps = torch.zeros((), dtype=torch.int64)  # in host memory: reading it does not wait for the device
        self._teacher = Teacher(net)
        self._warm = [weight.detach().clone() for weight in network_parameters(net)] if self.warm_up else []
        if net.images is not None and self._replay is not None and self._warm:
            self._learn(net, self._replay, len(net.images))

    def read_source(self, net: AdaptiveNetwork) -> Iterable[SourceBatch] | None:
        """Return batches of the source, and keep their images. Without any, warn and return None."""
        batches, self._is_read = super().read_source(net), True
        if batches is None:
            return None
        kept = list(batches)
        self._replay = ReplayImages(kept)
        return kept

    def _learn(self, net: AdaptiveNetwork, images: ReplayImages, size: int) -> None:
        """Let the student learn from the teacher on source images, and keep the weights of both; the network's stay."""
        weights = network_parameters(net)
        optimizer = self.make_optimizer(net.parameters)
        rates, steps = [group["lr"] for group in optimizer.param_groups], self.warm_up // size
        try:
            for step in range(steps):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (step + 1) / steps
                batch = images.draw(size, derive_seed(net.seed, "warm-up", step), net.device).images
                reference = self._teach(net, batch)
                net.backward(symmetric_cross_entropy(reference, net(batch).logits))
                optimizer.step()
                self._teacher.follow(net, self.teacher_momentum)
        finally:
            net.zero_grad()
            net.drop_outputs()
            with torch.no_grad():
                for weight, warm in zip(weights, self._warm, strict=True):
                    source = warm.clone()
                    warm.copy_(weight)
                    weight.copy_(source)

    # -- the batch

    def method_state(self) -> dict[str, Tensor]:
        """Return prototypes, weights of the teacher, those that the student begins with, and the number of steps."""
        warm = {f"warm.{number}": value for number, value in enumerate(self._warm)}
        return super().method_state() | self._teacher.state() | warm | {"steps": self._steps}

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step, and return the sum of the logits from before it; see ``SelfTrainingAdapter``."""
        if self._warm and not int(self._steps):
            with torch.no_grad():
                torch._foreach_copy_([*network_parameters(net)], self._warm)
        self._steps += 1
        self._replayed = self._draw(net, len(images), step)
        try:
            return super().update(net, images, step).detach() + self._reference
        finally:
            self._reference, self._replayed = torch.empty(0), None

    def _draw(self, net: AdaptiveNetwork, count: int, step: int) -> SourceBatch | None:
        """Return images with labels to replay; None where there are none."""
        if self.replay_weight and not self._is_read:  # a saved state has been continued
            self.read_source(net)
        if not self.replay_weight or self._replay is None or not self._replay.has_labels:
            return None
        place = net.counters
        return self._replay.draw(count, derive_seed(net.seed, "replay", place.visit, place.batch, step), net.device)

    def reference(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the logits of the teacher, (B, C)."""
        self._reference = self._teach(net, images)
        return self._reference

    def disagreement(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the mean of the cross-entropies in both directions, (B,)."""
        return symmetric_cross_entropy(reference, logits)

    def penalty(self, net: AdaptiveNetwork) -> Tensor | None:
        """Return the weighted cross-entropy of the student on source images."""
        if self._replayed is None:
            return None
        images, labels = self._replayed
        assert labels is not None, "only images of a source with labels are replayed"
        return self.replay_weight * labelled_cross_entropy(net(images).logits, labels)

    def after_step(self, net: AdaptiveNetwork) -> None:
        """Move the teacher towards the student."""
        self._teacher.follow(net, self.teacher_momentum)

    # -- both networks

    def _student(self, net: AdaptiveNetwork) -> Sequence[Tensor]:
        """Return the weights of the student: those after the warm-up until the first step."""
        return network_parameters(net) if int(self._steps) or not self._warm else self._warm

    @torch.no_grad()
    def _teach(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        with self._teacher.active(net):
            return net(images).logits

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the sum of the logits of student and teacher, (B, C)."""
        with other_values(network_parameters(net), [value.data for value in self._student(net)]):
            logits = super().predict(net, images)
        return logits + self._teach(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Let a copy of the network add the teacher's logits to its own; see ``Method.export``."""
        super().export(net, module)
        names = parameter_names(net)
        with torch.no_grad():
            for name, weight in zip(names, self._student(net), strict=True):
                module.get_parameter(name).copy_(weight)
        SummedLogits.attach(module, dict(zip(names, self._teacher.weights, strict=True)), net.output)

    def end(self) -> None:
        """End the adaptation of a network, keep its state, and drop the source images."""
        super().end()
        self._replay, self._is_read = None, False

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        own = ("teacher_momentum", "replay_weight", "warm_up")
        return super().protocol() | {name: getattr(self, name) for name in own}
