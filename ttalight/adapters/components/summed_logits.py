"""A network that adds the logits of the same network with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ttalight.models.outputs import Select, logits_of, with_logits

__all__ = ["SummedLogits"]


class SummedLogits:
    """Adds the logits of a second pass with other weights to what a network returns, as a forward hook.

    The weights are buffers of the network, so that its ``state_dict`` is complete and it can be moved.

    Args:
        buffers: Name of the buffer by name of the parameter that it stands in for.
        output: Where the logits are in what the network returns; see ``logits_of``.
    """

    def __init__(self, buffers: Mapping[str, str], output: Select = None) -> None:
        self.buffers, self.output = dict(buffers), output
        self._is_second = False

    @staticmethod
    def attach(module: nn.Module, weights: Mapping[str, Tensor], output: Select = None) -> None:
        """Let a network add the logits that it has with other weights.

        Args:
            module: The network, which is changed in place.
            weights: By name of the parameter.
            output: See ``SummedLogits``.
        """
        buffers = {name: f"teacher_{number}" for number, name in enumerate(weights)}
        for name, weight in weights.items():
            module.register_buffer(buffers[name], weight.detach().clone())
        module.register_forward_hook(SummedLogits(buffers, output), with_kwargs=True)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with the sum of the logits; None, which keeps it, in the second pass."""
        if self._is_second:
            return None
        self._is_second = True
        try:
            weights = {name: module.get_buffer(buffer) for name, buffer in self.buffers.items()}
            second = functional_call(module, weights, inputs, kwargs)
        finally:
            self._is_second = False
        logits = logits_of(output, self.output) + logits_of(second, self.output)
        return with_logits(output, logits, self.output)
