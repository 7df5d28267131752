"""Adaptation states that come from files: compared with the method and the network that take them over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ttalight.errors import InputError
from ttalight.files.difference import Between, difference
from ttalight.files.optimizer_state import optimizer_fault

__all__ = ["check_form", "check_values"]

_COUNT = Between(0, 2**62)


def check_form(state: Any, method: str, counters: Iterable[str]) -> None:
    """Check that a state has the entries that every captured one has, and is of a method.

    Args:
        state: What ``Engine.capture`` returned, or what is in a file instead.
        method: Name of the method.
        counters: Names of the counts.

    Raises:
        ValueError: If it is something else.
    """
    form = {
        "tensors": {},
        "source": {},
        "optimizer": None,
        "method": str,
        "configured": bool,
        "facts": {"classifier": None, "rows": None, "possible": None},
        "size": list,
        "counters": {name: Between(-1, _COUNT.high) if name == "visit" else _COUNT for name in counters},
        "passes": [Between(0.0, 2.0**62)] * 2,
        "before_probe": None,
        "schedules": dict,
        "ways": dict,
    }
    fault = difference(form, state) or difference([Between(1, 2**31)] * len(state["size"]), state["size"], "size")
    fault = fault or difference({kind: [str, str] for kind in state["ways"]}, state["ways"], "ways")
    if fault is None and state["before_probe"] is not None:
        fault = difference(form | {"before_probe": type(None)}, state["before_probe"], "before_probe")
    if fault is None and state["method"] != method:
        fault = f"it is of {state['method']!r:.50}"
    if fault is not None:
        raise InputError(fault)


def check_values(
    state: dict[str, Any],
    live: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    saved_as: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Check that tensors and optimizer of a state fit those that are to take its values.

    Args:
        state: A state that ``check_form`` has seen.
        live: What adaptation changes, by name.
        source: What a reset restores, by name. What is finite there has to be finite in the state.
        optimizer: The optimizer, None if nothing is trained.
        saved_as: See ``optimizer_fault``.

    Raises:
        ValueError: If they do not.
    """
    # A file cannot be without what a reset restores of the method's own.
    own = {name: value for name, value in source.items() if name.startswith("method.")}
    fault = difference({"tensors": live}, state)
    odd = [f"{name!s:.60}" for name in state["tensors"] if name not in live] if fault is None else []
    if odd:
        fault = f"it has {', '.join(sorted(odd)[:5])}, which are not adapted here"
    fault = fault or difference({"source": own}, state)
    if fault is None:
        seen = {**state["tensors"], **{name: state["source"][name] for name in own}}
        odd = [name for name, value in source.items() if _is_finite(value) and not _is_finite(seen[name])]
        fault = f"{odd[0]} has values that are not finite" if odd else None
    if fault is None and (optimizer is None) != (state["optimizer"] is None):
        fault = "only one of both has an optimizer"
    if fault is None and optimizer is not None:
        fault = optimizer_fault(optimizer, state["optimizer"], saved_as)
    if fault is not None:
        raise InputError(fault)


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
