"""MoETTA: experts in the normalisation layers, so that images of different domains adapt different weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttalight.adapters.components.filters import confidence_weight, entropy_margins
from ttalight.adapters.components.routed_norm import RoutedNorm, can_be_routed
from ttalight.adapters.self_training import SelfTrainingAdapter, per_image
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Network, Outputs
from ttalight.models.norm import NormLayer
from ttalight.seeding import derive_seed

__all__ = ["MoETTA"]


class MoETTA(SelfTrainingAdapter):
    """Minimises the entropy over experts: offsets of normalisation weights, chosen for each image by a router.

    Every normalisation layer keeps its weight and bias and gets E offsets of them, all zero at first, and a linear
    router on the mean of its input, which sends each image to one expert. Samples with an entropy up to the running
    mean of all batches' mean entropies lose exp(E0 - H) H; that mean also scales a penalty on routers that use some
    experts more than others, summed over layers. One forward and one backward a batch; the forward that the loss was
    made from is scored. Made for streams that mix domains.

    BatchNorm layers with experts normalise with the batch's statistics. Those without (``frozen``, ``plain``) keep the
    source's, as in the authors' code, whose network is in eval mode.

    Source: X. Fan, J. Jiang, Z. Chen, F. Huang, X. Chen, Q. Jiang, B. Zhang, X. Tang, Z. Wang, *MoETTA: Test-Time
    Adaptation Under Mixed Distribution Shifts with MoE-LayerNorm*, AAAI 2026, arXiv 2511.13760, after the authors'
    code. They report ImageNet alone, and the same settings serve CIFAR here. Different from the code: E0 is 0.4 ln C of
    the classifier's own C instead of 1000 classes, a batch without a kept sample changes nothing (there it is NaN), a
    reset starts the running mean again (there nothing resets; theirs is multiplied up from ratios of means, which is
    the same mean up to rounding, of all batches alike whatever their size), the code's fixed threshold and weight of
    the penalty are left out, and layers that are neither torch.nn's nor compute the same, such as timm's LayerNorm2d,
    are left alone and not counted, as there.

    Args:
        lr: Learning rate of SGD with momentum 0.9; 1e-3 by default.
        experts: E.
        top: Experts for each image.
        frozen: Layers without experts, by index from the input, or the share of all layers, counted from the input.
            The code freezes [0] for ViT-B/16, [0, 1, 2, 3] for ConvNeXt-B and the first 15 for ViT-L/16; the paper
            finds the first 5 best for ViT-B/16.
        plain: Indices of layers that adapt their own weight and bias instead.
        balance: Weight of the penalty, which the running mean multiplies.
        margin: E0 as a share of ln C.
        kwargs: See ``SelfTrainingAdapter``; ``parameters`` has no meaning here.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if no layer is left for experts.
    """

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "SGD", "momentum": 0.9, "lr": 1e-3, "batch_size": 64},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "lr": 1e-3, "batch_size": 64},
    }

    def __init__(
        self,
        lr: float | None = None,
        experts: int = 9,
        top: int = 1,
        frozen: Sequence[int] | float = (0,),
        plain: Sequence[int] = (),
        balance: float = 0.2,
        margin: float = 0.4,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        if kwargs.get("parameters") is not None:
            raise InputError("MoETTA adapts experts of its own: choose layers with frozen and plain, not parameters")
        if not 1 <= top <= experts:
            raise InputError(f"top must lie between 1 and experts, got top={top} and experts={experts}")
        if isinstance(frozen, (int, float)) and not 0 <= frozen < 1:
            raise InputError(f"frozen must be a list of indices or a share of the layers in [0, 1), got {frozen}")
        if balance < 0:
            raise InputError(f"balance must be at least 0, got {balance}")
        if not margin > 0:
            raise InputError(f"margin must be a positive share of ln C, got {margin}")
        self.experts, self.top = experts, top
        self.frozen: list[int] | float = frozen if isinstance(frozen, (int, float)) else list(frozen)
        self.plain = list(plain)
        self.balance, self.margin = balance, margin

    def check(self, net: Network) -> None:
        """Check that there are layers for experts."""
        for layer in net.norms:
            layer.check()
            if layer.carries_forward:
                layer.check_replaceable()
        routed, plain = self._choose([x for x in net.norms if can_be_routed(x)], type(net.module).__name__)
        net.check_trainable([parameter for layer in (*routed, *plain) for parameter in layer.affine])

    def configure(self, net: AdaptiveNetwork) -> None:
        """Give the layers experts that adapt, and normalise there with the batch's statistics."""
        layers = [layer for layer in net.norms if can_be_routed(layer)]
        routed, plain = self._choose(layers, type(net.module).__name__)
        generator = torch.Generator().manual_seed(derive_seed(net.seed, "experts"))
        self._routed = [RoutedNorm(layer, self.experts, self.top, generator) for layer in routed]
        for layer, stand_in in zip(routed, self._routed, strict=True):
            layer.replace(stand_in)
        own = {name: value for stand_in in self._routed for name, value in stand_in.parameters.items()}
        net.set_trainable(net.norm_affines(plain) if plain else [], own=own)
        net.set_norm_mode("source")
        net.set_norm_mode("batch", routed)
        dtype = torch.promote_types(self._routed[0].weight.dtype, torch.float32)
        self._mean = torch.zeros((), dtype=dtype, device=net.device)
        self._batches = torch.zeros((), dtype=dtype, device=net.device)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Give the layers of a copy of the network their experts; see ``Method.export``."""
        for stand_in in self._routed:
            stand_in.export(module.get_submodule(stand_in.layer.name))

    def _choose(self, layers: list[NormLayer], network: str) -> tuple[list[NormLayer], list[NormLayer]]:
        """Return the layers that get experts, and those that adapt as they are."""
        count = len(layers)
        frozen = list(range(int(self.frozen * count))) if isinstance(self.frozen, (int, float)) else self.frozen
        if count == 0:
            raise InputError(
                f"{network} has no normalisation layer of torch.nn with a weight a channel, which experts need: use "
                "another network or another method"
            )
        for name, indices in (("frozen", frozen), ("plain", self.plain)):
            if any(not 0 <= index < count for index in indices):
                raise InputError(
                    f"{name} takes indices of the {count} normalisation layers of {network} that can have experts, "
                    f"0 to {count - 1}, got {indices}"
                )
        if both := sorted(set(frozen) & set(self.plain)):
            raise InputError(f"layers {both} are in frozen and in plain: choose one")
        routed = [layer for index, layer in enumerate(layers) if index not in {*frozen, *self.plain}]
        if not routed:
            raise InputError(
                f"{network} has {count} normalisation layers that can have experts, and frozen and plain leave none: "
                "freeze fewer, or use another network"
            )
        return routed, [layers[index] for index in self.plain]

    def method_state(self) -> dict[str, Tensor]:
        """Return the running mean of the batches' mean entropies, and their number."""
        return {"mean_entropy": self._mean, "batches": self._batches}

    def weigh(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return exp(E0 - H) for samples up to the threshold and 0 for others."""
        with torch.no_grad():
            entropies = per_image(outputs.entropies)
            self._follow(entropies.mean())
            margin = entropy_margins(self.margin, outputs.logits)
            return confidence_weight(entropies, margin) * (entropies <= self._mean)

    def _follow(self, mean: Tensor) -> None:
        """Move the running mean by a batch's; one that is not finite counts for nothing."""
        finite = mean.isfinite()
        self._batches.add_(finite)
        self._mean.add_(torch.where(finite, (mean - self._mean) / self._batches, 0.0))

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the entropy of each prediction."""
        return per_image(outputs.entropies)

    def penalty(self, net: AdaptiveNetwork) -> Tensor:
        """Return the weighted load balance, summed over layers, of the pass that the losses were made from."""
        balances = [stand_in.balance for stand_in in self._routed if stand_in.balance is not None]
        for stand_in in self._routed:
            stand_in.balance = None
        return self.balance * self._mean * sum(balances, start=torch.zeros_like(self._mean))

    def check_defaults(self, classes: int) -> None:
        """Warn of nothing: the settings for CIFAR and ImageNet are the same."""

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        names = ("experts", "top", "frozen", "plain", "balance", "margin")
        return super().protocol() | {name: getattr(self, name) for name in names}
