"""RPL: robust pseudo-labelling."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ttalight.adapters.self_training import SelfTrainingAdapter, per_image
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import generalized_cross_entropy
from ttalight.models.network import Outputs

__all__ = ["RPL"]


class RPL(SelfTrainingAdapter):
    """Minimises the generalised cross-entropy to the network's own labels over the normalisation affines.

    One forward and one backward a batch.

    Source: E. Rusak, S. Schneider, G. Pachitariu, L. Eck, P. Gehler, O. Bringmann, W. Brendel, M. Bethge, *If your data
    distribution shifts, use self-learning*, TMLR 2022, arXiv 2104.12928. The settings are those of the benchmark of R.
    Marsden, M. Döbler, B. Yang, arXiv 2306.00650, whose SGD for ImageNet has Nesterov momentum.

    Args:
        q: Exponent of the loss in (0, 1]; towards 0 it is cross-entropy.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range.
    """

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "nesterov": True, "lr": 5e-4, "batch_size": 64},
    }

    def __init__(self, q: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < q <= 1:
            raise InputError(f"q must lie in (0, 1], got {q}")
        self.q = q

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the generalised cross-entropy of each sample to its likeliest class."""
        return per_image(generalized_cross_entropy(outputs.logits, self.q))
