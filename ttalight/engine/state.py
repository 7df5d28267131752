"""Everything that adaptation changes: undone after a failed batch, reset, captured and restored."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.files.optimizer_state import adopted_state
from ttalight.models.vectors import divide

__all__ = ["State"]


class State:
    """The tensors and the optimizer that adaptation changes, and the source that a reset restores.

    Args:
        net: The network, configured.
        method_state: Tensors that the method changes in place, by name.
    """

    def __init__(self, net: AdaptiveNetwork, method_state: dict[str, Tensor]) -> None:
        self.net = net
        names = {id(parameter): name for name, parameter in net.module.named_parameters()}
        names |= {id(parameter): f"own.{name}" for name, parameter in net.own.items()}
        #: What adaptation changes, by name.
        self.live: dict[str, Tensor] = {names[id(parameter)]: parameter for parameter in net.parameters}
        for norm in net.norms:
            if norm.mode == "ema":
                self.live |= {f"{norm.name}.statistics.{i}": value for i, value in enumerate(norm.statistics)}
        self.live |= {f"method.{name}": value for name, value in method_state.items()}
        leaves, others = net.leaves, list(self.live.values())[len(net.parameters) :]
        #: The tensors that hold it, and their values in the source, which a reset restores; these by name.
        self._held: list[Tensor] = [*leaves, *others]
        self._source = [value.detach().clone() for value in self._held]
        net.source = self._source[: len(leaves)] if net.joined is None else divide(self._source[0], net.parameters)
        self.source = dict(zip(self.live, [*net.source, *self._source[len(leaves) :]], strict=True))
        net.guard.watch(leaves, others)
        self._options = [] if net.optimizer is None else list(map(_options, net.optimizer.param_groups))
        #: What ``begin`` saw, the tensors among it, copies of these, and the optimizer's entries and options.
        self._seen: list[Any] = []
        self._tensors: list[Tensor] = []
        self._values: list[Tensor] = []
        self._is_nested = False
        self._entries: dict[Any, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._whole: dict[str, Any] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the present values for ``rollback``."""
        net, optimizer = self.net, self.net.optimizer
        if net.joined is not None and list(map(Tensor.data_ptr, net.parameters)) != net.joined.addresses:
            net.joined.refresh()
        states = {} if optimizer is None else optimizer.state
        kept = [value for entries in states.values() for value in entries.values()]
        seen = [*self._held, *kept]
        if len(seen) != len(self._seen) or any(map(operator.is_not, seen, self._seen)):
            self._seen, self._tensors = seen, [value for value in seen if isinstance(value, Tensor)]
            self._values = [value.detach().clone() for value in self._tensors]
            self._is_nested = any(isinstance(value, (dict, list)) for value in kept)
            self._entries = {parameter: dict(entries) for parameter, entries in states.items()}
        elif self._tensors:
            torch._foreach_copy_(self._values, self._tensors)
        if optimizer is not None:
            self._groups = list(map(dict, optimizer.param_groups))
            self._whole = copy.deepcopy(optimizer.state_dict()) if self._is_nested else None

    def _refresh(self) -> None:
        if self.net.joined is not None:
            self.net.joined.refresh()

    @torch.no_grad()
    def rollback(self) -> None:
        """Restore the values that ``begin`` remembered."""
        self._refresh()
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._values)
        optimizer = self.net.optimizer
        if optimizer is None:
            return
        if self._whole is not None:
            optimizer.load_state_dict(self._whole)
            return
        optimizer.state.clear()
        optimizer.state.update({parameter: dict(entries) for parameter, entries in self._entries.items()})
        for group, options in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(options)

    @torch.no_grad()
    def reset(self) -> None:
        """Restore weights, statistics, method state and optimizer to the source, bit for bit, and nothing else."""
        self._set(self._source)
        if self.net.optimizer is not None:
            self.net.optimizer.state.clear()
            for group, options in zip(self.net.optimizer.param_groups, self._options, strict=True):
                group.update(_options(options))
        self.net.guard.moved = False
        self.net.counters.updates_at_reset = self.net.counters.updates

    @contextmanager
    def at_source(self) -> Iterator[None]:
        """Set weights, statistics and method state to those of the source temporarily."""
        before = [value.detach().clone() for value in self._held]
        try:
            self._set(self._source)
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        self._refresh()
        if self._held:
            torch._foreach_copy_(self._held, values)

    def capture(self) -> dict[str, Any]:
        """Return copies of all that later batches depend on: tensors and plain values only."""
        optimizer = None if self.net.optimizer is None else tree_map(_copied, self.net.optimizer.state_dict())
        if optimizer is not None and self.net.joined is not None:
            optimizer = self.net.joined.divide_state(optimizer)
        return {
            "tensors": {name: value.detach().clone() for name, value in self.live.items()},
            "source": {name: value.clone() for name, value in self._method_source().items()},
            "optimizer": optimizer,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``capture`` returned."""
        for name, value in self.live.items():
            value.copy_(state["tensors"][name])
        if self.net.optimizer is not None:
            whole = state["optimizer"] if self.net.joined is None else self.net.joined.join_state(state["optimizer"])
            adopted = adopted_state(self.net.optimizer, whole)
            self.net.optimizer.load_state_dict(copy.deepcopy(adopted))
        for name, value in self._method_source().items():
            value.copy_(state["source"][name])
        self.net.guard.moved = True

    def _method_source(self) -> dict[str, Tensor]:
        """Return what a reset restores of the method's own state, which a state file cannot be without."""
        return {name: value for name, value in self.source.items() if name.startswith("method.")}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a parameter group without its parameters."""
    return {name: _copied(value) for name, value in group.items() if name != "params"}
