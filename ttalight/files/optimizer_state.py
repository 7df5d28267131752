"""States of optimizers that come from files: compared with the optimizer that takes them over."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ttalight.files.difference import Between, difference

__all__ = ["adopted_state", "optimizer_fault"]

#: No rate or other number of an optimizer is larger.
_LARGEST = 1e38


def optimizer_fault(
    optimizer: Optimizer, state: Any, saved_as: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> str | None:
    """Return why a state does not fit an optimizer, None if it does.

    Args:
        optimizer: The optimizer. It is not changed.
        state: What should be its ``state_dict()``, at any time.
        saved_as: Makes of its ``state_dict()`` what is saved, which then has no further entries. By default it is
            saved as it is.
    """
    form = _stepped(optimizer) if saved_as is None else saved_as(_stepped(optimizer))
    fault = difference({"param_groups": [dict] * len(form["param_groups"]), "state": dict}, state, "optimizer")
    for own, seen in zip(form["param_groups"], [] if fault else state["param_groups"], strict=False):
        options = {name: _form(value) for name, value in own.items() if name in seen}
        fault = fault or difference(options, seen, "optimizer.param_groups")
    if fault is not None:
        return fault
    numbers = {number for group in form["param_groups"] for number in group["params"]}
    for key, entries in state["state"].items():
        if key not in numbers:
            return f"optimizer.state has the unknown {key!s:.50}"
        expected = {name: _form(value) for name, value in form["state"].get(key, {}).items()}
        fault = difference(expected, entries, f"optimizer.state.{key}", whole=saved_as is not None)
        odd = [name for name in expected if fault is None and not _is_sound(entries[name])]
        if odd:
            fault = f"optimizer.state.{key}.{odd[0]} has values that no step leaves there"
        if fault is not None:
            return fault
    return None


def adopted_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state to load: names and flags of the optimizer, of which some depend on the device, are its own."""
    groups = optimizer.state_dict()["param_groups"]
    for own, seen in zip(groups, state["param_groups"], strict=True):
        numbers = [name for name, value in own.items() if name != "params" and _form(value) is not None]
        own |= {name: seen[name] for name in numbers if name in seen}
    return {"state": state["state"], "param_groups": groups}


def _stepped(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of a copy that has made a step: it has all entries that a step makes."""
    with torch.inference_mode(False):
        twin = copy.deepcopy(optimizer)
        for group in twin.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        with contextlib.suppress(Exception):  # one that needs a closure, or whatever a user's own one raises
            twin.step()
    return twin.state_dict()


def _form(value: Any) -> Any:
    """Return the form of an entry, for ``difference``; None for names and flags."""
    if isinstance(value, (tuple, list)):
        return [_form(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return value
    return Between(-_LARGEST if value < 0 else 0.0, _LARGEST) if type(value) in (int, float) else None


def _is_sound(value: Any) -> bool:
    """Return whether a value may be one of an optimizer: no NaN, and no scalar below zero."""
    if not isinstance(value, torch.Tensor):
        return True
    return not bool(value.isnan().any() or (value.ndim == 0 and value < 0))
