"""What models return: a tensor, or a dict, dataclass, tuple or list that has the logits among other things."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Select", "logits_of", "map_tensors", "with_logits"]


Select = str | int | Callable[[Any], Tensor] | None


def logits_of(output: Any, select: Select = None) -> Tensor:
    """Return the logits in what a model returned: a tensor, a dict with ``logits`` (or ``out``), or a dataclass.

    Args:
        output: What the model returned.
        select: Key or position of the logits, or a function of the output that returns them.

    Raises:
        TypeError: If there are none; the message says what was returned.
    """
    if isinstance(output, Mapping):
        output = output.get(_logits_key(output))
    elif dataclasses.is_dataclass(output):
        output = getattr(output, "logits", None)
    if isinstance(output, Tensor) and output.ndim in (2, 4):
        return output
    seen = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"{type(output).__name__}"
    raise TypeError(
        f"the model returned {seen}; adaptation reads logits of shape (B, C) or (B, C, H, W) from a tensor, from the "
        "key 'logits' (or 'out') of a dict, or from the field 'logits' of a dataclass"
    )


def with_logits(output: Any, logits: Tensor, select: Select = None) -> Any:
    """Return what a model returned with other logits.

    Args:
        output: Something that ``logits_of`` takes.
        logits: To be put in.
        select: See ``logits_of``.
    """
    if isinstance(output, Mapping):
        return type(output)({**output, _logits_key(output): logits})  # type: ignore[call-arg]
    return logits if isinstance(output, Tensor) else dataclasses.replace(output, logits=logits)


def map_tensors(output: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return what a model returned with each tensor in it changed; anything else stays.

    Args:
        output: A tensor, or dicts, dataclasses, tuples and lists, in one another, of such.
        change: What becomes of a tensor.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        return type(output)({name: map_tensors(value, change) for name, value in output.items()})  # type: ignore[call-arg]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output) if field.init}
        return dataclasses.replace(output, **{name: map_tensors(value, change) for name, value in values.items()})
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(map_tensors(value, change) for value in output))
    if type(output) in (tuple, list):
        return type(output)(map_tensors(value, change) for value in output)
    return output


def _logits_key(output: Mapping[str, Any]) -> str:
    return "logits" if "logits" in output else "out"
