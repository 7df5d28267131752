"""SAR: sharpness-aware minimisation of the entropy of reliable samples, with a way back from collapse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ttalight.adapters.components.filters import entropy_margins, update_mean
from ttalight.adapters.entropy import EntropyAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Outputs, Selection
from ttalight.models.vectors import divide, flatten, gradient_vector

__all__ = ["SAR", "sam_perturbation"]


class SAR(EntropyAdapter):
    """Minimises the entropy of reliable samples at the worst weights nearby, and starts again when it has collapsed.

    A step goes forward, keeps the samples with an entropy below E0 = ``margin`` ln C, and goes backward; moves up by
    ``rho`` along the gradient; goes forward there, keeps those of the samples whose entropy is still below E0, and
    goes backward; and steps by that gradient from the weights before. Two forwards and two backwards a batch; the first
    forward gives the prediction. Plug-in terms count in both passes.

    A running mean (0.9) of the second entropy that falls below ``recovery`` tells a collapse onto one class: weights,
    optimizer with its momentum, and the mean itself are then reset to the source, once. ``recoveries`` of the engine
    counts how often.

    Source: S. Niu, J. Wu, Y. Zhang, Z. Wen, Y. Chen, P. Zhao, M. Tan, *Towards Stable Test-Time Adaptation in Dynamic
    Wild World*, ICLR 2023, arXiv 2302.12400; sharpness-aware minimisation is that of P. Foret et al., ICLR 2021, arXiv
    2010.01412. Which layers adapt follows the authors' names where these mean something: not stage 4 of a ResNet, not
    blocks 10 to 12 and the final norm of a ViT-B, but all layers of three-stage networks for CIFAR except a final
    ``norm``. Other networks of four blocks or more leave out the last quarter by depth; see
    ``norms_before_last_block``. Unlike the authors' code E0 follows the network's own number of classes; one collapse
    is one reset, where theirs puts the low mean back afterwards and resets again and again; momentum is reset too; a
    step that keeps no sample changes nothing, where theirs still moves by its momentum; and the network stays in eval
    mode.

    The learning rate of the authors is 2.5e-4 for residual networks and 1e-3 for vision transformers, both for batches
    of 64; with fewer than 32 images it is 2.5e-4 / 32 an image for residual networks, with any number 1e-3 / 64 an
    image for transformers, and twice that for single images.

    Args:
        margin: E0 as a share of ln C, in (0, 1].
        rho: Length of the perturbation.
        recovery: Entropy, in nats, below which the running mean tells a collapse; 0 never recovers. The authors' 0.2 is
            for 1000 classes: on ten, an ordinary confident network may lie below.
        kwargs: See ``EntropyAdapter``. By default the affines in front of the last block adapt, see above.

    Raises:
        ValueError: If an argument is out of range.
    """

    shards_batches = True

    published_parameters: Selection = "norm_before_last_block"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "SGD", "momentum": 0.9, "lr": 2.5e-4, "batch_size": 64},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "lr": 2.5e-4, "batch_size": 64},
        "imagenet_below_32": {"optimizer": "SGD", "momentum": 0.9, "lr_per_image": 2.5e-4 / 32},
        "imagenet_vit": {"optimizer": "SGD", "momentum": 0.9, "lr": 1e-3, "lr_per_image": 1e-3 / 64, "batch_size": 64},
    }

    def __init__(self, margin: float = 0.4, rho: float = 0.05, recovery: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < margin <= 1:
            raise InputError(f"margin must be a share of ln C in (0, 1], got {margin}")
        if rho < 0:
            raise InputError(f"rho must be at least 0, got {rho}")
        if recovery < 0:
            raise InputError(f"recovery must be an entropy of at least 0, got {recovery}")
        self.margin = margin
        self.rho = rho
        self.recovery = recovery

    def configure(self, net: AdaptiveNetwork) -> None:
        """Choose the affines that adapt, and begin without a mean entropy."""
        super().configure(net)
        dtype = torch.promote_types(net.parameters[0].dtype, torch.float32)
        self._mean = torch.full((1,), torch.nan, dtype=dtype, device=net.device)

    def method_state(self) -> dict[str, Tensor]:
        """Return the running mean of the second entropy, NaN until the first step."""
        return super().method_state() | {"mean_entropy": self._mean}

    def weigh(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return 1 for the samples with an entropy below E0, 0 for the others."""
        entropies = self.entropies(outputs).detach()
        return (entropies < entropy_margins(self.margin, outputs.logits)).to(entropies.dtype)

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step, with the gradient at the worst weights nearby; see ``SelfTrainingAdapter``."""
        first = net(images)
        weights = self.weigh(net, images, first)
        self.backward(net, self.losses(net, images, first), weights, first)
        with net.with_weights(sam_perturbation(net.parameters, self.rho)):
            second = net(images)
            still = self.weigh(net, images, second)
            weights = still if weights is None else still * weights
            losses = self.losses(net, images, second)
            self._watch(net, losses.detach(), weights != 0)
            self.backward(net, losses, weights, second)
        self.optimizer_step(net)
        return first.logits

    def _watch(self, net: AdaptiveNetwork, entropies: Tensor, kept: Tensor) -> None:
        """Move the mean entropy, and ask for a reset where it shows a collapse."""
        update_mean(self._mean, entropies.nan_to_num()[:, None], kept)
        net.reset_if(self._mean[0] < self.recovery)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {"margin": self.margin, "rho": self.rho, "recovery": self.recovery}


@torch.no_grad()
def sam_perturbation(parameters: Sequence[torch.nn.Parameter], rho: float) -> list[Tensor]:
    """Return the parameters' values moved by ``rho`` along their gradient, which is normalised over all of them.

    Args:
        parameters: With gradients; one without does not move.
        rho: Length of the way.
    """
    gradient = gradient_vector(parameters)
    scale = rho / (torch.linalg.vector_norm(gradient) + 1e-12)
    return divide(flatten(parameters) + gradient * scale, parameters)
