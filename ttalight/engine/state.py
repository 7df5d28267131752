"""Everything that adaptation changes: undone after a failed batch, reset, captured and restored."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.files.optimizer_state import adopted_state
from ttalight.models.vectors import divide, flatten

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
        self._live = list(self.live.values())
        #: Values that a reset restores, by name.
        self.source = {name: value.detach().clone() for name, value in self.live.items()}
        self._source = list(self.source.values())
        count = len(net.parameters)
        net.source = self._source[:count]
        net.guard.watch(self._live[:count], self._live[count:])
        self._options = [] if net.optimizer is None else list(map(_options, net.optimizer.param_groups))
        #: What ``begin`` saw, the tensors that hold it, copies of these, and the optimizer's entries and options.
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
        optimizer = self.net.optimizer
        seen = [*self._live, *_entries(optimizer)]
        if len(seen) != len(self._seen) or any(map(operator.is_not, seen, self._seen)):
            self._tensors = [*self._live, *_packed(optimizer)]
            self._values = [value.detach().clone() for value in self._tensors]
            kept = _entries(optimizer)
            self._seen, self._is_nested = [*self._live, *kept], any(isinstance(value, (dict, list)) for value in kept)
            states = () if optimizer is None else optimizer.state.items()
            self._entries = {parameter: dict(entries) for parameter, entries in states}
        elif self._tensors:
            torch._foreach_copy_(self._values, self._tensors)
        if optimizer is not None:
            self._groups = list(map(dict, optimizer.param_groups))
            self._whole = copy.deepcopy(optimizer.state_dict()) if self._is_nested else None

    @torch.no_grad()
    def rollback(self) -> None:
        """Restore the values that ``begin`` remembered."""
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
        before = [value.detach().clone() for value in self._live]
        try:
            self._set(self._source)
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        if self._live:
            torch._foreach_copy_(self._live, values)

    def capture(self) -> dict[str, Any]:
        """Return copies of all that later batches depend on: tensors and plain values only."""
        optimizer = self.net.optimizer
        return {
            "tensors": {name: value.detach().clone() for name, value in self.live.items()},
            "source": {name: value.clone() for name, value in self._method_source().items()},
            "optimizer": None if optimizer is None else tree_map(_copied, optimizer.state_dict()),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``capture`` returned."""
        for name, value in self.live.items():
            value.copy_(state["tensors"][name])
        if self.net.optimizer is not None:
            adopted = adopted_state(self.net.optimizer, state["optimizer"])
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


def _entries(optimizer: Optimizer | None) -> list[Any]:
    """Return what an optimizer keeps of its parameters."""
    return [] if optimizer is None else [value for own in optimizer.state.values() for value in own.values()]


def _packed(optimizer: Optimizer | None) -> list[Tensor]:
    """Return tensors that hold all that an optimizer keeps, few of them, which are copied in a fraction of the time."""
    if optimizer is None or not optimizer.state:
        return []
    states, packed = list(optimizer.state.values()), []
    for name in states[0]:
        parts = [entries.get(name) for entries in states]
        if {type(part) for part in parts} == {Tensor} and len({(part.dtype, part.device) for part in parts}) == 1:
            packed.append(flatten(parts))
            for entries, part in zip(states, divide(packed[-1], parts), strict=True):
                entries[name] = part
    known = {value.untyped_storage().data_ptr() for value in packed}
    loose = (value for value in _entries(optimizer) if isinstance(value, Tensor))
    return [*packed, *(value for value in loose if value.untyped_storage().data_ptr() not in known)]
