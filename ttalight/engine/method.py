"""The interface between the engine and an adaptation method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.schedule import Schedule
from ttalight.errors import InputTypeError
from ttalight.models.exported_norm import replace_norms
from ttalight.models.network import Network
from ttalight.models.norm import NormMode
from ttalight.models.outputs import Select
from ttalight.models.passes.pass_policy import PassPolicy

__all__ = ["Method", "OnBadBatch", "Reset"]

#: When the engine restores the source: at announced boundaries, before every batch, never, or after N updates.
Reset = Literal["domain", "batch", "never"] | int
#: Policy for an invalid batch: raise an error, predict without adapting, or predict with the source model.
OnBadBatch = Literal["error", "skip", "source"]


class Method(ABC):
    """An adaptation method as the engine runs it: ``configure`` once, then ``adapt`` once for every batch.

    A method keeps what it changes in the tensors of ``method_state`` and in the network, and nowhere else.
    """

    reset: Reset = "domain"
    on_bad_batch: OnBadBatch = "error"
    classifier: str | None = None
    output: Select = None
    passes: PassPolicy | None = None
    #: Norm that the gradient of a step is clipped to. None clips nothing.
    clip_norm: float | None = None
    #: Whether ``make_optimizer`` treats all numbers alike, so that it may get one vector instead of many parameters.
    is_elementwise: bool = False
    #: Whether logits come from before or after the update.
    prediction: str = "before"
    #: Statistics of BatchNorm layers in ``predict``. By default those of the layers' modes.
    prediction_norm: NormMode | None = None
    #: Numbers of steps after which ``adapt`` leaves predictions in ``net.readings``.
    read_at: Sequence[int] = ()
    #: Which batches are adapted to; all where there are none. The engine has copies.
    schedules: Sequence[Schedule] = ()

    def check(self, net: Network) -> None:  # noqa: B027
        """Check what can be known of a network before its first batch; raises ValueError or TypeError."""

    @abstractmethod
    def configure(self, net: AdaptiveNetwork) -> None:
        """Set norm modes and trainable parameters, with the first batch in ``net.images``.

        There are no images where a saved state follows, whose tensors are in ``net.saved``: it has what was measured.
        """

    @abstractmethod
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Adapt to a batch of finite images, (B, 3, H, W), and return its logits."""

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the logits of a batch of finite images, (B, 3, H, W), from the present state, without adapting."""
        with torch.no_grad():
            return net(images, norm=self.prediction_norm).logits

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Change a copy of the network's module, in place, so that it predicts what ``predict`` returns.

        Raises:
            TypeError: If the prediction is not that of a network.
        """
        replace_norms(net.norms, module, self.prediction_norm)

    def method_state(self) -> dict[str, Tensor]:
        """Return the tensors that the method changes in place; they are reset and saved with the weights."""
        return {}

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return a new optimizer of the trainable parameters."""
        raise InputTypeError(f"{type(self).__name__} has trainable parameters but no optimizer: define make_optimizer")

    def check_progress(self, net: AdaptiveNetwork, logits: Tensor) -> None:  # noqa: B027
        """Warn of what the logits of the first and of the fiftieth batch show."""
