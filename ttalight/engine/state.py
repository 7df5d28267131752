"""Everything that adaptation changes: undone after a failed batch, reset, saved and restored."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ttalight.engine.adaptive_network import AdaptiveNetwork

__all__ = ["State", "difference"]

_SCALARS = (int, float, bool, str, type(None))


class State:
    """The tensors, optimizer and counts that adaptation changes, and the source that a reset restores.

    Args:
        net: The network, with its trainable parameters and norm modes set.
        method_state: Tensors that the method changes in place, by name.
    """

    def __init__(self, net: AdaptiveNetwork, method_state: dict[str, Tensor]) -> None:
        self.net = net
        names = {id(parameter): name for name, parameter in net.module.named_parameters()}
        names |= {id(parameter): f"own.{name}" for name, parameter in net.own.items()}
        #: What adaptation changes, by name.
        self.live: dict[str, Tensor] = {names[id(parameter)]: parameter for parameter in net.parameters}
        weights = list(self.live.values())
        for norm in net.norms:
            if norm.mode == "ema":
                self.live |= {f"{norm.name}.statistics.{i}": value for i, value in enumerate(norm.statistics)}
        self.live |= {f"method.{name}": value for name, value in method_state.items()}
        self._live = list(self.live.values())
        #: Values that a reset restores.
        self.source = [value.detach().clone() for value in self._live]
        net.source = self.source[: len(weights)]
        net.guard.watch(weights, self._live[len(weights) :])
        self._options = [] if net.optimizer is None else [_options(group) for group in net.optimizer.param_groups]
        #: What ``begin`` remembered: tensors and copies of their values, optimizer.
        self._tensors: list[Tensor] = []
        self._values: list[Tensor] = []
        self._optimizer: Any = None

    # -- one batch

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the present values, for ``rollback``."""
        optimizer = self.net.optimizer
        self._optimizer = None if optimizer is None else _OptimizerState(optimizer)
        tensors = self._live if self._optimizer is None else [*self._live, *self._optimizer.tensors]
        if len(tensors) != len(self._tensors) or any(map(_is_another, tensors, self._tensors)):
            self._tensors, self._values = list(tensors), [value.detach().clone() for value in tensors]
        elif tensors:
            torch._foreach_copy_(self._values, self._tensors)

    @torch.no_grad()
    def rollback(self) -> None:
        """Restore the values that ``begin`` remembered."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._values)
        if self._optimizer is not None and self.net.optimizer is not None:
            self._optimizer.restore(self.net.optimizer)

    # -- the source

    @torch.no_grad()
    def reset(self) -> None:
        """Restore weights, statistics, method state and optimizer to the source, bit for bit, and nothing else."""
        if self._live:
            torch._foreach_copy_(self._live, self.source)
        optimizer = self.net.optimizer
        if optimizer is not None:
            optimizer.state.clear()
            for group, options in zip(optimizer.param_groups, self._options, strict=True):
                group.update(options)
        self.net.guard.moved = False
        self.net.counters.updates_at_reset = self.net.counters.updates

    # -- files and copies

    def capture(self) -> dict[str, Any]:
        """Return copies of all that later batches depend on: tensors and plain values only."""
        optimizer = self.net.optimizer
        reset = {name: value.clone() for name, value in zip(self.live, self.source, strict=True) if _of_method(name)}
        return {
            "tensors": {name: value.detach().clone() for name, value in self.live.items()},
            "source": reset,
            "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``capture`` returned, of an equal method on an equal network.

        Raises:
            ValueError: If the state is another method's or another network's; nothing has changed then.
        """
        self._check(state)
        for name, value in self.live.items():
            value.copy_(state["tensors"][name])
        for name, value in zip(self.live, self.source, strict=True):
            if _of_method(name):
                value.copy_(state["source"][name])
        if self.net.optimizer is not None:
            self.net.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.net.guard.moved = True

    def _check(self, state: dict[str, Any]) -> None:
        source = {name: value for name, value in self.live.items() if _of_method(name)}
        fault = difference({"tensors": self.live, "source": source}, state)
        if fault is not None:
            raise ValueError(fault)
        optimizer, saved = self.net.optimizer, state["optimizer"]
        if (saved is None) != (optimizer is None):
            raise ValueError("only one of both has an optimizer")
        if optimizer is None:
            return
        fresh = optimizer.state_dict()
        fault = difference({"param_groups": fresh["param_groups"]}, saved)
        shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
        for key, entries in saved.get("state", {}).items() if fault is None else ():
            known = type(key) is int and 0 <= key < len(shapes) and isinstance(entries, dict)
            tensors = [value for value in entries.values() if isinstance(value, Tensor)] if known else []
            if not known or any(value.ndim and value.shape != shapes[key] for value in tensors):
                fault = f"optimizer state of parameter {key!r:.50}"
        if fault is not None:
            raise ValueError(f"optimizer: {fault}")


class _OptimizerState:
    """What an optimizer keeps between two steps, remembered without copying its tensors where it is of the usual form.

    Args:
        optimizer: Its state maps parameters to dicts of tensors and plain values.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = [_options(group) for group in optimizer.param_groups]
        self._state: dict[Any, Any] = {}
        #: Tensors that a step changes in place.
        self.tensors: list[Tensor] = []
        self._all: dict[str, Any] | None = None
        for key, entries in optimizer.state.items():
            if not isinstance(entries, dict):
                self._copy_all(optimizer)
                return
            self._state[key] = dict(entries)
            for value in entries.values():
                if isinstance(value, Tensor):
                    self.tensors.append(value)
                elif not isinstance(value, _SCALARS):
                    self._copy_all(optimizer)
                    return

    def _copy_all(self, optimizer: Optimizer) -> None:
        self.tensors, self._all = [], copy.deepcopy(optimizer.state_dict())

    def restore(self, optimizer: Optimizer) -> None:
        """Restore what was remembered; the values of ``tensors`` are the caller's to restore."""
        if self._all is not None:
            optimizer.load_state_dict(self._all)
            return
        optimizer.state.clear()
        optimizer.state.update(self._state)
        for group, options in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(options)


def difference(expected: Any, seen: Any, name: str = "state") -> str | None:
    """Return the first difference of two states in names, types and shapes, None if there is none.

    Args:
        expected: Dicts, lists, tensors and plain values; None and empty containers stand for anything.
        seen: What should be like it; a dict may have more entries at the top.
        name: Name of both.
    """
    if expected is None:
        return None
    if isinstance(expected, Tensor):
        if isinstance(seen, Tensor):
            shapes = tuple(seen.shape), tuple(expected.shape)
            return None if shapes[0] == shapes[1] else f"{name} has shape {shapes[0]}, expected {shapes[1]}"
    elif isinstance(expected, dict) and isinstance(seen, dict):
        odd = sorted(map(str, expected.keys() - seen.keys() if name == "state" else expected.keys() ^ seen.keys()))
        if odd and expected:
            return f"only on one side: {', '.join(odd[:5])}"
        found = (difference(value, seen[key], str(key)) for key, value in expected.items())
        return next((fault for fault in found if fault is not None), None)
    elif isinstance(expected, (list, tuple)) and isinstance(seen, (list, tuple)):
        if expected and len(seen) != len(expected):
            return f"{name} has {len(seen)} entries, expected {len(expected)}"
        found = (difference(*both, f"{name}[{i}]") for i, both in enumerate(zip(expected, seen, strict=False)))
        return next((fault for fault in found if fault is not None), None)
    elif type(seen) is type(expected) or {type(seen), type(expected)} <= {int, float}:
        return None
    return f"{name} is a {type(seen).__name__}, expected a {type(expected).__name__}"


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"
    }


def _of_method(name: str) -> bool:
    return name.startswith("method.")


def _is_another(first: Tensor, second: Tensor) -> bool:
    return first is not second
