"""TTT-MAE's steps: a masked autoencoder trained on each test image by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.intermediate_predictions import check_readings
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.models.network import Network

__all__ = ["MaskedReconstruction"]


class MaskedReconstruction(Adapter):
    """Trains the encoder of a masked autoencoder on masks of each image, then predicts the image without a mask.

    Serves ``MaskedTTT``. Every image begins with the source weights and has weights and an optimizer of its own.
    Several images adapt at the same time, each as it would alone. The masks of a step are drawn once and serve all
    images of the batch, so that a prediction depends on no other image. For each image ``steps`` forwards and backwards
    of ``masks`` masks, which have a quarter of the patches, and one more forward.

    Source: Y. Gandelsman, Y. Sun, X. Chen, A. A. Efros, *Test-Time Training with Masked Autoencoders*, NeurIPS 2022,
    arXiv 2209.07522, after the authors' code: SGD without weight decay, at 1e-2 for each 256 masks.

    Args:
        lr: Learning rate of SGD.
        momentum: Of SGD.
        steps: Gradient steps for each image; 0 is the source model.
        masks: Masks of an image in a step.
        images_at_once: Images that adapt at the same time. Memory grows with it: weights, gradient and momentum of
            the encoder, and the activations of ``masks`` passes, for each image.
        read_at: Numbers of steps after which the results have predictions too.
        reset: ``batch``, since nothing is kept.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: At the first batch, if the module is no masked autoencoder with a classifier.
    """

    prediction = "after"

    def __init__(
        self,
        lr: float = 5e-3,
        momentum: float = 0.9,
        steps: int = 20,
        masks: int = 128,
        images_at_once: int = 8,
        read_at: Sequence[int] = (),
        reset: Literal["batch"] = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(reset=reset, **kwargs)
        for name, value in (("lr", lr), ("momentum", momentum)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        for name, count, least in (("steps", steps, 0), ("masks", masks, 1), ("images_at_once", images_at_once, 1)):
            if count < least:
                raise InputError(f"{name} must be at least {least}, got {count}")
        if reset != "batch":
            raise InputError(f"reset must be 'batch': every image begins with the source weights, got {reset!r}")
        self.lr, self.momentum, self.steps = lr, momentum, steps
        self.masks, self.images_at_once = masks, images_at_once
        self.read_at = check_readings(read_at, steps, "batch")

    def check(self, net: Network) -> None:
        """Check that the module is a masked autoencoder with a classifier.

        Raises:
            TypeError: If it is not.
        """
        needed = ("draw_masks", "reconstruction_losses", "classify", "adaptable_parameters")
        if not all(hasattr(net.module, name) for name in needed):
            raise InputTypeError(
                f"{type(net.module).__name__} has no masked autoencoder to train: use MaskedTTT, or another method"
            )
        net.check_trainable(net.module.adaptable_parameters())  # type: ignore[operator]

    def configure(self, net: AdaptiveNetwork) -> None:
        """Change nothing: images have weights of their own."""

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Train on the masks of each image, and predict it."""
        task: Any = net.module
        visible = [task.draw_masks(self.masks, net.draws(step)) for step in range(self.steps)]
        parts = [self._episodes(net, part, visible) for part in torch.split(images, self.images_at_once)]
        for step in self.read_at:
            net.readings[step] = torch.cat([readings[step] for _, readings in parts])
        net.forwards += self.steps * self.masks + 1 + len(self.read_at)
        net.backwards += self.steps * self.masks
        return torch.cat([logits for logits, _ in parts])

    def _episodes(
        self, net: AdaptiveNetwork, images: Tensor, visible: Sequence[Tensor]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return logits, (B, C), of images that adapt at the same time, and their readings.

        Args:
            net: The network.
            images: (B, 3, H, W).
            visible: Places of the patches that are visible in each step, int64 (M, K).
        """
        adaptable = set(map(id, net.module.adaptable_parameters()))  # type: ignore[operator]
        weights = {
            f"task.{name}": value.detach().expand(len(images), *value.shape).clone().requires_grad_()
            for name, value in net.module.named_parameters()
            if id(value) in adaptable
        }
        optimizer = torch.optim.SGD(weights.values(), lr=self.lr, momentum=self.momentum)
        readings = {}
        for step, places in enumerate(visible):
            if step in self.read_at:
                readings[step] = self._predict(net, weights, images)
            with torch.enable_grad():
                losses = _run(net, "reconstruction_losses", weights, images, places)
                losses.mean(1).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return self._predict(net, weights, images), readings

    @torch.no_grad()
    def _predict(self, net: AdaptiveNetwork, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return _run(net, "classify", weights, images)[:, 0].to(images.dtype)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: each image has a network of its own."""
        raise InputTypeError(
            f"{type(self).__name__} predicts each image with weights of its own, so there is no network to export"
        )

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("lr", "momentum", "steps", "masks")
        return super().protocol() | {"optimizer": "SGD"} | {name: getattr(self, name) for name in names}


class _Method(nn.Module):
    """Calls a method of a task, so that ``functional_call`` can run it with other weights."""

    def __init__(self, task: nn.Module, name: str) -> None:
        super().__init__()
        self.task, self.name = task, name

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = getattr(self.task, self.name)(*inputs)
        return output


def _run(net: AdaptiveNetwork, name: str, weights: dict[str, Tensor], images: Tensor, *others: Tensor) -> Tensor:
    """Return what a method of the task returns for each image with its own weights, (B, ...).

    Args:
        net: The network.
        name: Name of the method.
        weights: By name, (B, ...).
        images: (B, 3, H, W).
        others: Arguments that all images share.
    """
    method = _Method(net.module, name)

    def run_one(own: dict[str, Tensor], image: Tensor) -> Tensor:
        output: Tensor = functional_call(method, own, (image[None], *others))
        return output

    with net.precision(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no batching rule on every device
        output: Tensor = vmap(run_one)(weights, images)
    return output
