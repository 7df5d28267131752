"""The base of the methods that minimise the entropy of predictions."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ttalight.adapters.self_training import SelfTrainingAdapter, per_image
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import opinion_entropy
from ttalight.models.network import Outputs

__all__ = ["EntropyAdapter"]


class EntropyAdapter(SelfTrainingAdapter):
    """Steps on the entropy of predictions.

    Args:
        lr: See ``GradientAdapter``.
        entropy: ``softmax`` for the entropy of the predicted probabilities, or ``opinion`` for COME's, which has a
            share of uncertainty beside the classes; see ``opinion_entropy``. Filters and weights use the same one.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, lr: float | None = None, *, entropy: Literal["softmax", "opinion"] = "softmax", **kwargs: Any
    ) -> None:
        super().__init__(lr, **kwargs)
        if entropy not in ("softmax", "opinion"):
            raise InputError(f"entropy must be 'softmax' or 'opinion', got {entropy!r}")
        self.entropy = entropy

    def entropies(self, outputs: Outputs) -> Tensor:
        """Return the entropy of each prediction, (B,), with gradients where the logits have them."""
        return per_image(outputs.entropies if self.entropy == "softmax" else opinion_entropy(outputs.logits))

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the entropy of each prediction."""
        return self.entropies(outputs)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | ({} if self.entropy == "softmax" else {"entropy": self.entropy})
