"""TIPI: predictions that do not change under the worst small perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ttalight.adapters.components.intermediate_predictions import predict
from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.self_training import SelfTrainingAdapter, per_image
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, UsageError
from ttalight.losses.entropy import expectation, log_probabilities
from ttalight.models.exported_norm import replace_norms
from ttalight.models.network import Outputs
from ttalight.models.norm import PassState

__all__ = ["TIPI", "divergence", "input_gradient", "perturbation"]


class TIPI(SelfTrainingAdapter):
    """Minimises the divergence between the predictions of images and of adversarially perturbed images.

    The perturbation is clip(r + ``epsilon`` sign(g)) to [-``epsilon``, ``epsilon``], with r a uniform random start in
    that range and g the gradient of the divergence with respect to the pixels at the start. The prediction of the clean
    images is a target without gradient.

    BatchNorm works in two ways. The pass of the clean images uses the batch's statistics and updates the running ones;
    passes of perturbed images use their own batch's statistics and leave the running ones alone. The authors keep a
    second set of running statistics for the latter, which no prediction reads, so this is the same. The prediction
    (``after``) is made with the updated running statistics; batches of more than ``large_batch`` images are predicted
    with their own. The loss is still made with the statistics of the batch: fewer than 8 images have none worth the
    name.

    Four forwards and two backwards a batch: the clean images, the start of the search, the perturbed images, the
    prediction. With ``entropy_weight`` or terms the clean pass has a backward too.

    Source: A. T. Nguyen, T. Nguyen-Tang, S.-N. Lim, P. Torr, *TIPI: Test Time Adaptation with Transformation
    Invariance*, CVPR 2023 (no arXiv id); written from the formulas. The perturbation is that of their code for
    ImageNet. Three differences to their other settings. On CIFAR they start at the image itself (r = 0), where the
    divergence is at its minimum and the sign of its gradient is that of rounding errors; here the start is random there
    too. Precision is the run's, not always mixed. The learning rate is not rewritten for every batch: the authors' is
    in proportion to the batch size, so on B images pass ``lr`` = 1e-3 B / 200.

    Args:
        lr: Learning rate of Adam; 1e-3 by default, which belongs to 200 images a batch.
        epsilon: Greatest change of a pixel, in [0, 1] images; above 0.
        entropy_weight: Factor of the entropy of the clean predictions; published are 0 (CIFAR-10), 5 (CIFAR-100) and 1
            (ImageNet).
        reverse: Measure KL(perturbed, clean), as in the paper, instead of KL(clean, perturbed).
        large_batch: Batches with more images are predicted with their own statistics; None for never, the
            published value for ImageNet.
        prediction: See ``SelfTrainingAdapter``.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network has nothing to adapt.
    """

    norm = "ema"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "imagenet": {
            "optimizer": "SGD", "momentum": 0.9, "lr": 2.5e-4, "batch_size": 64, "entropy_weight": 1.0,
            "large_batch": None,
        },
    }  # fmt: skip

    def __init__(
        self,
        lr: float | None = None,
        epsilon: float = 2 / 255,
        entropy_weight: float = 0.0,
        reverse: bool = True,
        large_batch: int | None = 64,
        prediction: Literal["before", "after"] = "after",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, prediction=prediction, **kwargs)
        if epsilon <= 0:
            raise InputError(f"epsilon must be above 0, got {epsilon}")
        if entropy_weight < 0:
            raise InputError(f"entropy_weight must be at least 0, got {entropy_weight}")
        if large_batch is not None and large_batch < 0:
            raise InputError(f"large_batch must be at least 0 or None, got {large_batch}")
        check_normalization(mean, std)
        self.epsilon = epsilon
        self.entropy_weight = entropy_weight
        self.reverse = reverse
        self.large_batch = large_batch
        self.mean, self.std = mean, std
        self._space = PixelSpace()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters, and let clean passes update the running statistics."""
        super().configure(net)
        net.set_norm_mode("ema")
        self._space = pixel_space(net, self.mean, self.std)

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the logits of the batch from updated statistics, or from its own: of large ones, and ``before``."""
        large = self.large_batch is not None and len(images) > self.large_batch
        return predict(net, images, "batch" if large or self.prediction == "before" else "source")

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Let a copy of the network normalise as predictions do; see ``Method.export``."""
        if self.prediction == "before":
            replace_norms(net.norms, module, "batch")
        elif self.large_batch is None:
            replace_norms(net.norms, module, "source")
        else:
            replace_norms(net.norms, module, "batch", above=self.large_batch)

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step towards predictions that the perturbation does not change; see ``SelfTrainingAdapter``."""
        with torch.set_grad_enabled(bool(self.entropy_weight or self.terms)):
            outputs = net(images)
        target = outputs.logits.detach()
        moved = net(self._worst(net, images, target, step), norm="batch").logits
        losses = self.losses(net, images, outputs) + per_image(self._distance(target, moved))
        self.backward(net, losses, None, outputs)
        self.optimizer_step(net)
        return target

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return what a clean prediction loses besides its instability: its weighted entropy."""
        return self.entropy_weight * per_image(outputs.entropies)

    def _worst(self, net: AdaptiveNetwork, images: Tensor, target: Tensor, step: int) -> Tensor:
        """Return the images perturbed from a random start along the gradient of the divergence there."""
        pixels = self._space.to_pixels(images)
        drawn = torch.rand(pixels.shape, generator=net.draws(step), device=pixels.device)
        start = (self.epsilon * (2 * drawn - 1)).to(pixels.dtype)
        near = (pixels + start).requires_grad_()
        slope = input_gradient(net.parameters, net.pass_state, near, lambda: self._divergence_at(net, near, target))
        return self._space.from_pixels(pixels + perturbation(start, slope, self.epsilon))

    def _divergence_at(self, net: AdaptiveNetwork, pixels: Tensor, target: Tensor) -> Tensor:
        logits = net(self._space.from_pixels(pixels), norm="batch").logits
        return self._distance(target, logits).sum()

    def _distance(self, target: Tensor, logits: Tensor) -> Tensor:
        return divergence(logits, target) if self.reverse else divergence(target, logits)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        settings = {
            "epsilon": self.epsilon,
            "entropy_weight": self.entropy_weight,
            "reverse": self.reverse,
            "large_batch": self.large_batch,
        }
        return super().protocol() | settings | self._space.protocol()


def perturbation(start: Tensor, slope: Tensor, epsilon: float) -> Tensor:
    """Return the change of the pixels: from the start by ``epsilon`` along the slope's sign, clipped to +-``epsilon``.

    Args:
        start: Random change that the slope was measured at, (B, 3, H, W), each value within +-``epsilon``.
        slope: Gradient of the divergence, same shape.
        epsilon: Greatest change of a pixel.
    """
    return (start + epsilon * slope.sign()).clamp(-epsilon, epsilon)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of the second prediction from the first, KL(first, second).

    Args:
        first: Logits, (B, C) or (B, C, ...).
        second: Logits of the same shape.

    Returns:
        (B,) or (B, ...), in nats.
    """
    one, two = log_probabilities(first), log_probabilities(second)
    return expectation(one, one - two)


def input_gradient(
    parameters: Sequence[nn.Parameter], passes: PassState, images: Tensor, loss: Callable[[], Tensor]
) -> Tensor:
    """Return the gradient of a scalar with respect to images, and none with respect to parameters.

    It is made by ``backward``, which networks under reentrant checkpointing take.

    Args:
        parameters: Trainable parameters.
        passes: State of the network's passes.
        images: A leaf that requires gradients.
        loss: Makes the scalar.

    Raises:
        RuntimeError: If it does not depend on the images.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        value = loss()
        if value.requires_grad:
            with passes.repeat():
                value.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None  # of a forward that lets everything require gradients
    if images.grad is None:
        raise UsageError(
            "the prediction does not depend on the pixels: does the model's forward run under no_grad, freeze its "
            "parameters or detach its outputs?"
        )
    return images.grad
