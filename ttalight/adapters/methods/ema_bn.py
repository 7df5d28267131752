"""Running statistics updated by the target: the control of test-time training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.intermediate_predictions import check_readings, steps_with_readings
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Network

__all__ = ["EMABN", "move_statistics"]


class EMABN(Adapter):
    """Updates the running statistics by N forwards, takes no gradient step, and predicts with them.

    After N forwards the statistics hold 1 - (1 - momentum)^N of the batch. Where the module is a task with an
    auxiliary loss, the forwards are those of the task's views, keyed as in ``TestTimeTraining``: what test-time
    training gains over this control is what its loss has learned. Elsewhere the forwards are on the images.
    N + 1 forwards a batch.

    Args:
        steps: Number N of forwards that update the statistics; 0 is the source model.
        momentum: Weight of the batch in each update.
        read_at: Numbers of forwards after which the results have predictions too; needs ``reset="batch"``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network has no BatchNorm layer.
    """

    norm = "ema"
    prediction = "after"
    prediction_norm = "source"

    def __init__(self, steps: int = 1, momentum: float = 0.1, read_at: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if steps < 0:
            raise InputError(f"steps must be at least 0, got {steps}")
        self.steps = steps
        self.momentum = check_momentum(momentum)
        self.read_at = check_readings(read_at, steps, self.reset)

    def check(self, net: Network) -> None:
        """Check that there are BatchNorm layers whose statistics can be chosen."""
        for layer in net.batch_norms():
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Let the BatchNorm layers update their statistics."""
        net.batch_norms()
        move_statistics(net, "ema", self.momentum)

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Move the statistics, then predict with them."""
        with torch.no_grad():
            for step in steps_with_readings(net, images, self.steps, self.read_at):
                if hasattr(net.module, "auxiliary_loss"):
                    net.auxiliary_loss(images, net.draws(step))
                else:
                    net(images)
        return self.predict(net, images)


def move_statistics(net: AdaptiveNetwork, norm: str, momentum: float) -> None:
    """Run the layers that a task lets adapt (all BatchNorm layers by default) on the batch's statistics.

    Args:
        net: The network.
        norm: ``ema`` lets the running statistics follow; anything else leaves them as they are.
        momentum: Weight of the batch when they follow.
    """
    modes = getattr(net.module, "adaptation_modes", None)
    chosen = None if modes is None else {id(module) for module in modes()}
    for layer in net.norms:
        if layer.is_batch_norm and (chosen is None or id(layer.module) in chosen):
            layer.mode = "ema" if norm == "ema" else "batch"
            layer.momentum = momentum


def check_momentum(momentum: float) -> float:
    """Return the momentum if it lies in (0, 1]."""
    if not 0 < momentum <= 1:
        raise InputError(f"momentum must lie in (0, 1], got {momentum}")
    return momentum
