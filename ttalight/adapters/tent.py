"""Tent: entropy minimisation on the affines of the normalisation layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ttalight.adapters.adapter import GradientAdapter
from ttalight.adapters.term import Term, add_terms
from ttalight.losses import entropy
from ttalight.models.network import Network

__all__ = ["Tent"]


class Tent(GradientAdapter):
    """Minimises the entropy of the predictions over the weights and biases of the normalisation layers.

    BatchNorm layers normalise with the batch's statistics; LayerNorm and GroupNorm are adapted as they are. The
    published protocol scores the forward that the loss was made from (``prediction="before"``): one forward and one
    backward a batch. ``after`` adds a forward.

    Source: D. Wang, E. Shelhamer, S. Liu, B. Olshausen, T. Darrell, *Tent: Fully Test-Time Adaptation by Entropy
    Minimization*, ICLR 2021, arXiv 2006.10726. Unlike the authors' code the network stays in eval mode, so drop-out
    and stochastic depth are off, and LayerNorm and GroupNorm affines adapt too.

    Args:
        lr: Learning rate of Adam (betas 0.9 and 0.999, no weight decay); 1e-3 by default.
        prediction: Whether logits come from ``before`` or ``after`` the update.
        terms: Plug-in terms that are added to the entropy of each sample.
        kwargs: See ``GradientAdapter`` and ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network has no normalisation layer
            with weight and bias.
    """

    norm = "batch"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "lr": 2.5e-4, "batch_size": 64},
    }

    def __init__(
        self,
        lr: float | None = None,
        prediction: Literal["before", "after"] = "before",
        terms: list[Term] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if prediction not in ("before", "after"):
            raise ValueError(f"prediction must be 'before' or 'after', got {prediction!r}")
        self.prediction = prediction
        self.terms = terms or []

    def configure(self, net: Network) -> None:
        """Free the affines and normalise with the batch's statistics."""
        net.free(net.norm_affines())
        net.set_norm_mode("batch")
        if self.terms:
            _ = net.head  # from here on passes keep the features that terms read

    def adapt(self, net: Network, images: Tensor) -> Tensor:
        """Step on the mean entropy of the batch."""
        for _ in range(self.steps):
            outputs = net(images)
            net.step(add_terms(_per_image(entropy(outputs.logits)), self.terms, net, outputs))
        if self.prediction == "before":
            return outputs.logits
        with torch.no_grad():
            return net(images).logits


def _per_image(losses: Tensor) -> Tensor:
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
