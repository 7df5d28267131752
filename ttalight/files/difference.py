"""The difference of two structures of tensors and plain values, such as states that come from files."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

__all__ = ["Between", "difference", "known"]


class Between(NamedTuple):
    """Numbers from ``low`` to ``high``, whole ones if ``low`` is an int."""

    low: float
    high: float


def difference(expected: Any, seen: Any, name: str = "", whole: bool = False) -> str | None:
    """Return the first difference of two structures in names, types and shapes, None if there is none.

    Args:
        expected: Dicts, lists, tensors and plain values, or a type or ``Between`` instead of a value. None stands for
            anything.
        seen: What should be like it.
        name: Name of both.
        whole: Whether dicts may have no further entries. Where they may, an empty dict or list stands for any.
    """
    label = name or "state"
    if expected is None:
        return None
    kind = expected if isinstance(expected, type) else type(expected)
    if isinstance(expected, Between):
        return _number_difference(expected, seen, label)
    if isinstance(expected, torch.Tensor) and isinstance(seen, torch.Tensor):
        return _tensor_difference(expected, seen, label)
    if isinstance(expected, dict) and isinstance(seen, dict):
        missing = [str(key) for key in expected if key not in seen]
        odd = [f"{key!s:.50}" for key in seen if key not in expected] if whole else []
        if missing or odd:
            return f"{label} {'lacks' if missing else 'has the unknown'} {', '.join((missing or odd)[:5])}"
        prefix = f"{name}." if name else ""
        found = (difference(value, seen[key], f"{prefix}{key}", whole) for key, value in expected.items())
    elif isinstance(expected, (list, tuple)) and isinstance(seen, (list, tuple)):
        if len(seen) != len(expected) and (expected or whole):
            return f"{label} has {len(seen)} entries, expected {len(expected)}"
        pairs = enumerate(zip(expected, seen, strict=False))
        found = (difference(*both, f"{label}[{index}]", whole) for index, both in pairs)
    elif not _is_of(seen, kind):
        return f"{label} is of type {type(seen).__name__}, expected {kind.__name__}"
    elif type(seen) is type(expected) is float and math.isnan(seen) and not math.isnan(expected):
        return f"{label} is nan"
    else:
        return None
    return next((fault for fault in found if fault is not None), None)


def _is_of(value: Any, kind: type) -> bool:
    if {type(value), kind} <= {int, float}:
        return True
    return isinstance(value, dict) if kind is dict else type(value) is kind


def known(value: Any, other: Any) -> Any:
    """Return a copy of nested dicts with the entries that are in another structure as well; an empty one has any."""
    if not (isinstance(value, dict) and isinstance(other, dict) and other):
        return value
    return {name: known(part, other[name]) for name, part in value.items() if name in other}


def _number_difference(expected: Between, seen: Any, label: str) -> str | None:
    allowed = (int,) if type(expected.low) is int else (int, float)
    if type(seen) not in allowed:
        return f"{label} is of type {type(seen).__name__}, expected {'int' if len(allowed) == 1 else 'float'}"
    if not expected.low <= seen <= expected.high:
        return f"{label} is {seen!s:.50}, expected {expected.low:g} to {expected.high:g}"
    return None


def _tensor_difference(expected: torch.Tensor, seen: torch.Tensor, label: str) -> str | None:
    if expected.shape != seen.shape:
        return f"{label} has shape {tuple(seen.shape)}, expected {tuple(expected.shape)}"
    kinds = [(value.is_floating_point(), value.is_complex(), value.dtype == torch.bool) for value in (expected, seen)]
    if kinds[0] != kinds[1]:
        return f"{label} is of type {seen.dtype}, expected {expected.dtype}"
    return None
