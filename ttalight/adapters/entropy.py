"""The base of the methods that minimise the entropy of predictions."""

from __future__ import annotations

from abc import ABC
from typing import Any, Literal

import torch
from torch import Tensor

from ttalight.adapters.components.filters import image_probabilities, update_mean
from ttalight.adapters.self_training import SelfTrainingAdapter, per_image
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import decoupled_entropy, opinion_entropy
from ttalight.models.network import Outputs

__all__ = ["EntropyAdapter"]


class EntropyAdapter(SelfTrainingAdapter, ABC):
    """Steps on the entropy of predictions.

    Args:
        lr: See ``GradientAdapter``.
        entropy: ``softmax`` for the entropy of the predicted probabilities. ``opinion`` for COME's, which has a share
            of uncertainty beside the classes, in the loss and in filters and weights; see ``opinion_entropy``.
            ``decoupled`` for AdaDEM's in the loss, with the running mean (0.9) of predictions, which begins uniform;
            see ``decoupled_entropy``.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        entropy: Literal["softmax", "opinion", "decoupled"] = "softmax",
        **kwargs: Any,
    ) -> None:
        super().__init__(lr, **kwargs)
        if entropy not in ("softmax", "opinion", "decoupled"):
            raise InputError(f"entropy must be 'softmax', 'opinion' or 'decoupled', got {entropy!r}")
        self.entropy = entropy

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set what adapts, and begin with a uniform mean of predictions where the loss has one."""
        super().configure(net)
        if self.entropy == "decoupled":
            possible = net.possible_classes.to(torch.promote_types(net.parameters[0].dtype, torch.float32))
            self._marginal = possible / possible.sum()

    def method_state(self) -> dict[str, Tensor]:
        """Return the running mean of predictions where the loss has one."""
        return {"marginal": self._marginal} if self.entropy == "decoupled" else {}

    def entropies(self, outputs: Outputs) -> Tensor:
        """Return the entropy of each prediction, (B,), with gradients where the logits have them."""
        return per_image(opinion_entropy(outputs.logits) if self.entropy == "opinion" else outputs.entropies)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the loss of each prediction, and update the mean of predictions where it has one."""
        if self.entropy != "decoupled":
            return self.entropies(outputs)
        predictions = image_probabilities(outputs.logits.detach())
        update_mean(self._marginal, predictions, predictions.new_ones(len(predictions), dtype=torch.bool))
        return per_image(decoupled_entropy(outputs.logits, self._marginal))

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | ({} if self.entropy == "softmax" else {"entropy": self.entropy})
