"""Everything that adaptation changes: undone after a failed batch, reset, captured and restored."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.optimizer_state import adopted_state, optimizer_fault
from ttalight.models.vectors import divide, flatten
from ttalight.untrusted import difference

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
        #: Values that a reset restores.
        self.source = [value.detach().clone() for value in self._live]
        count = len(net.parameters)
        net.source = self.source[:count]
        net.guard.watch(self._live[:count], self._live[count:])
        self._options = [] if net.optimizer is None else list(map(_options, net.optimizer.param_groups))
        #: What ``begin`` saw and remembered: tensors, those that hold them all and copies of these, the optimizer.
        self._seen: list[Any] = []
        self._tensors: list[Tensor] = []
        self._values: list[Tensor] = []
        self._is_packed = False
        self._entries: dict[Any, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._whole: dict[str, Any] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the present values for ``rollback``."""
        seen, optimizer = list[Any](self._live), self.net.optimizer
        if optimizer is not None:
            self._groups, self._entries, self._whole = list(map(dict, optimizer.param_groups)), {}, None
            for parameter, entries in optimizer.state.items():
                self._entries[parameter] = dict(entries)
                seen.extend(entries.values())
        if len(seen) != len(self._seen) or any(map(operator.is_not, seen, self._seen)):
            self._seen, self._is_packed = seen, False
            self._remember([value for value in seen if isinstance(value, Tensor)])
        elif optimizer is not None and not self._is_packed:
            self._pack(optimizer)
        elif self._tensors:
            torch._foreach_copy_(self._values, self._tensors)
        if optimizer is not None and any(isinstance(value, (dict, list)) for value in self._seen[len(self._live) :]):
            self._whole = copy.deepcopy(optimizer.state_dict())

    def _remember(self, tensors: list[Tensor]) -> None:
        self._tensors, self._values = tensors, [value.detach().clone() for value in tensors]

    def _pack(self, optimizer: torch.optim.Optimizer) -> None:
        """Lay the optimizer's tensors of a kind out as parts of one, which is copied in a fraction of the time."""
        packed: list[Tensor] = []
        parted: set[int] = set()
        states = list(optimizer.state.values())
        for name in states[0] if states else ():
            parts = [entries.get(name) for entries in states]
            if len({(part.dtype, part.device) if isinstance(part, Tensor) else None for part in parts}) > 1:
                continue
            if isinstance(parts[0], Tensor):
                packed.append(flatten(parts))
                for entries, part in zip(states, divide(packed[-1], parts), strict=True):
                    entries[name] = part
                    parted.add(id(part))
        self._seen = [*self._live, *(value for entries in states for value in entries.values())]
        self._entries = {parameter: dict(entries) for parameter, entries in optimizer.state.items()}
        loose = [value for value in self._seen if isinstance(value, Tensor) and id(value) not in parted]
        self._is_packed = True
        self._remember([*loose, *packed])

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
        optimizer.state.update(self._entries)
        for group, options in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(options)

    @torch.no_grad()
    def reset(self) -> None:
        """Restore weights, statistics, method state and optimizer to the source, bit for bit, and nothing else."""
        if self._live:
            torch._foreach_copy_(self._live, self.source)
        if self.net.optimizer is not None:
            self.net.optimizer.state.clear()
            for group, options in zip(self.net.optimizer.param_groups, self._options, strict=True):
                group.update(_options(options))
        self.net.guard.moved = False
        self.net.counters.updates_at_reset = self.net.counters.updates

    def capture(self) -> dict[str, Any]:
        """Return copies of all that later batches depend on: tensors and plain values only."""
        optimizer = self.net.optimizer
        return {
            "tensors": {name: value.detach().clone() for name, value in self.live.items()},
            "source": {name: value.clone() for name, value in self._method_source().items()},
            "optimizer": None if optimizer is None else _unpacked(optimizer.state_dict()),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Check that ``restore`` can take over a state that nobody vouches for; a ValueError where it does not fit."""
        tensors, optimizer, source = state["tensors"], self.net.optimizer, self._method_source()
        fault = difference({"tensors": self.live}, state, whole=False)
        odd = [f"{name!s:.60}" for name in tensors if name not in self.live] if fault is None else []
        if odd:
            fault = f"it has {', '.join(sorted(odd)[:5])}, which are not adapted here"
        fault = fault or difference({"source": source}, state)
        if fault is None:
            named = {**dict(zip(self.live, self.source, strict=True)), **source}
            seen = {**tensors, **{name: state["source"][name] for name in source}}
            odd = [name for name, value in named.items() if _is_finite(value) and not _is_finite(seen[name])]
            fault = f"{odd[0]} has values that are not finite" if odd else None
        if fault is None and (optimizer is None) != (state["optimizer"] is None):
            fault = "only one of both has an optimizer"
        if fault is None and optimizer is not None:
            fault = optimizer_fault(optimizer, state["optimizer"])
        if fault is not None:
            raise ValueError(fault)

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
        named = zip(self.live, self.source, strict=True)
        return {name: value for name, value in named if name.startswith("method.")}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a parameter group without its parameters."""
    values = {name: value for name, value in group.items() if name != "params"}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of an optimizer's state whose tensors share no memory."""
    entries = {
        key: {name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in own.items()}
        for key, own in state["state"].items()
    }
    return {**copy.deepcopy({name: value for name, value in state.items() if name != "state"}), "state": entries}


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
