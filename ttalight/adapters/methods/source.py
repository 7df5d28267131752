"""No adaptation: the row that every table starts with."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.adapters.adapter import Adapter
from ttalight.engine.adaptive_network import AdaptiveNetwork

__all__ = ["Source"]


class Source(Adapter):
    """Predicts with the source model as it is, bit for bit; its cost is one forward a batch.

    Args:
        kwargs: See ``Adapter``.
    """

    shards_batches = True

    def configure(self, net: AdaptiveNetwork) -> None:
        """Change nothing."""

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the source model's logits."""
        with torch.no_grad():
            return net(images).logits
