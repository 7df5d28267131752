"""CMF: the weights follow a hidden model that a Kalman filter keeps between source and stream."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ttalight.adapters.methods.roid import ROID
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.vectors import divide, flatten

__all__ = ["CMF", "filter_gain"]

#: Trainable parameters of the ViT-B/16 that the process variance is tuned for.
_REFERENCE_SIZE = 38400


class CMF(ROID):
    """Steps on the losses of ``ROID``, and filters the weights instead of averaging them with the source.

    A hidden model drifts back to the source (by ``source_share``), observes the weights after each step, with a gain
    1 - beta that follows from a variance recursion, and the weights move a hundredth of the way (``hidden_share``) to
    it. Cost and prediction are those of ``ROID``; there is one more copy of the trainable parameters.

    Source: J.-H. Lee, J.-H. Chang, *Continual Momentum Filtering on Parameter Space for Online Test-time Adaptation*,
    ICLR 2024 (no arXiv id). As in the authors' code beta is at least 0.89, and 1 from 0.9999 on. Their tables of
    continual streams never reset: ``reset="never"``. A reset restores the variance too, which their code does not; only
    the adapted parameters are filtered, since the rest is equal in all models.

    Args:
        process_variance: Variance q that each step adds, for 38,400 trainable parameters; it grows in proportion to
            their number. Above 0.
        hidden_share: Share of the way from the weights to the hidden model after each step, in [0, 1].
        source_share: Share of the way from the hidden model to the source before each observation, in [0, 1].
        kwargs: See ``ROID``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the process variance reaches 1 for the
            number of trainable parameters, and as for ``ROID``.
    """

    published: ClassVar[dict[str, dict[str, Any]]] = ROID.published

    def __init__(
        self,
        process_variance: float = 0.005,
        hidden_share: float = 0.01,
        source_share: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(source_share=source_share, **kwargs)
        if process_variance <= 0:
            raise InputError(f"process_variance must be above 0, got {process_variance}")
        if not 0 <= hidden_share <= 1:
            raise InputError(f"hidden_share must lie in [0, 1], got {hidden_share}")
        self.process_variance = process_variance
        self.hidden_share = hidden_share
        self._scaled_variance = process_variance
        #: The hidden model, one vector for all trainable parameters.
        self._hidden = torch.empty(0)
        self._variance = torch.zeros(())

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with the source as hidden model, and no variance."""
        super().configure(net)
        count = sum(parameter.numel() for parameter in net.parameters)
        self._scaled_variance = self.process_variance * count / _REFERENCE_SIZE
        if self._scaled_variance >= 1:
            raise InputError(
                f"the process variance must stay below 1, but {self.process_variance} for {_REFERENCE_SIZE} parameters "
                f"is {self._scaled_variance:.3g} for the {count} trainable ones: choose a smaller process_variance"
            )
        self._hidden = flatten(net.parameters)
        self._variance = torch.zeros_like(self._mean_prediction[0])

    def method_state(self) -> dict[str, Tensor]:
        """Return the running mean of predictions, the hidden model and its variance."""
        return super().method_state() | {"hidden": self._hidden, "variance": self._variance}

    @torch.no_grad()
    def after_step(self, net: AdaptiveNetwork) -> None:
        """Filter the hidden model and average the weights with it."""
        beta, variance = filter_gain(self._variance, self._scaled_variance, 1 - self.source_share)
        self._variance.copy_(variance)
        weights = flatten(net.parameters)
        self._hidden.lerp_(net.source_vector, self.source_share).lerp_(weights, (1 - beta).to(weights.dtype))
        moved = weights.lerp_(self._hidden, self.hidden_share)
        torch._foreach_copy_(list[Tensor](net.parameters), divide(moved, net.parameters))

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {"process_variance": self.process_variance, "hidden_share": self.hidden_share}


def filter_gain(variance: Tensor, added: float, decay: float) -> tuple[Tensor, Tensor]:
    """Return beta, the weight of the hidden model against an observation, and the variance after the observation.

    Args:
        variance: Of the hidden model, a scalar.
        added: Variance q that a step adds; that of an observation is 1 - q.
        decay: Share of the hidden model that is left after the move to the source.
    """
    grown = decay**2 * variance + added
    beta = ((1 - added) / (grown + (1 - added))).clamp(min=0.89)
    beta = torch.where(beta < 0.9999, beta, 1.0)
    return beta, beta * grown
