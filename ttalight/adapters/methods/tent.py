"""Tent: entropy minimisation on the affines of the normalisation layers."""

from __future__ import annotations

from typing import Any, ClassVar

from ttalight.adapters.entropy import EntropyAdapter

__all__ = ["Tent"]


class Tent(EntropyAdapter):
    """Minimises the entropy of the predictions over the weights and biases of the normalisation layers.

    BatchNorm layers normalise with the batch's statistics; LayerNorm and GroupNorm are adapted as they are. The
    published protocol scores the forward that the loss was made from (``prediction="before"``): one forward and one
    backward a batch. ``after`` adds a forward.

    Source: D. Wang, E. Shelhamer, S. Liu, B. Olshausen, T. Darrell, *Tent: Fully Test-Time Adaptation by Entropy
    Minimization*, ICLR 2021, arXiv 2006.10726. Unlike the authors' code the network stays in eval mode, so drop-out
    and stochastic depth are off, and LayerNorm and GroupNorm affines adapt too.

    Args:
        lr: Learning rate of Adam (betas 0.9 and 0.999, no weight decay); 1e-3 by default.
        kwargs: See ``EntropyAdapter``.
    """

    shards_batches = True

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "lr": 2.5e-4, "batch_size": 64},
    }
