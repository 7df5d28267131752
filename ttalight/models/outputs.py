"""Outputs of models: a tensor, or a dict, dataclass, tuple or list that has the logits among other things."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import is_masked

__all__ = ["Select", "logits_of", "map_tensors", "possible_classes", "with_logits"]

#: Where the logits are in what a model returns: a key or a field, a position, or a function that returns them. None
#: finds them, see ``logits_of``.
Select = str | int | Callable[[Any], Tensor] | None

_KNOWN = ("logits", "out")


def logits_of(output: Any, select: Select = None) -> Tensor:
    """Return the logits in what a model returned.

    Without ``select`` they are the tensor itself, the key or field ``logits`` (or ``out``) of a dict, a dataclass or a
    named tuple, or the only element of a tuple or list.

    Args:
        output: What the model returned.
        select: Which part of it the logits are, where there are several or it has another name.

    Returns:
        (B, C) or (B, C, H, W), with two classes or more.

    Raises:
        TypeError: If there are no logits; the message says what was returned.
        ValueError: If ``select`` names no part of it, or there is one class only.
    """
    if callable(select):
        logits, named = select(output), f"output={_name(select)} returned"
    else:
        place = _place(output) if select is None else select
        logits = output if place is None else _part(output, place)
        named = "the model returned" if place is None or select is None else f"output={select!r} is"
    if isinstance(logits, Tensor) and logits.ndim in (2, 4) and logits.shape[1] > 1:
        return logits
    if isinstance(logits, Tensor) and (logits.ndim == 1 or (logits.ndim in (2, 4) and logits.shape[1] == 1)):
        raise InputError(
            f"{named} one logit for each image, shape {tuple(logits.shape)}, and adaptation needs one for each class: "
            "let the model return torch.cat((torch.zeros_like(z), z), 1) of its logit z, (B, 1), which are the same "
            "probabilities as logits of two classes"
        )
    raise InputTypeError(_no_logits(output if select is None else logits, named, select))


def with_logits(output: Any, logits: Tensor, select: Select = None) -> Any:
    """Return what a model returned with other logits instead of its own.

    Logits that a function has computed, and not taken out of the structure, have no place there: they are returned as
    they are.

    Args:
        output: Something that ``logits_of`` takes; its logits may be None.
        logits: The new ones.
        select: See ``logits_of``.
    """
    if callable(select):
        chosen = select(output)
        found = False

        def change(part: Tensor) -> Tensor:
            nonlocal found
            found = found or part is chosen
            return logits if part is chosen else part

        changed = map_tensors(output, change)
        return changed if found else logits
    place = _place(output) if select is None else select
    return logits if place is None else _with_part(output, place, logits)


def map_tensors(output: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return what a model returned with each tensor in it changed; anything else stays.

    Args:
        output: A tensor, or dicts, dataclasses, tuples and lists, in one another, of such.
        change: What becomes of a tensor.
    """
    if isinstance(output, Tensor):
        return change(output)
    if _is_dataclass(output):
        fields = (field.name for field in dataclasses.fields(output) if field.init)
        values = {name: map_tensors(getattr(output, name), change) for name in fields}
        return dataclasses.replace(output, **values)
    if isinstance(output, Mapping):
        return _with_items(output, {name: map_tensors(value, change) for name, value in output.items()})
    if isinstance(output, (tuple, list)):
        return _like(output, [map_tensors(value, change) for value in output])
    return output


def possible_classes(logits: Tensor) -> Tensor:
    """Return which classes are not masked, boolean (C,): those that are not masked for all images.

    Args:
        logits: (B, C) or (B, C, H, W).
    """
    return is_masked(logits).movedim(1, -1).flatten(0, -2).logical_not().any(0)


def _place(output: Any) -> str | int | None:
    """Return where the logits of a structure are without being told; None for the structure itself."""
    if isinstance(output, Mapping) and not _is_dataclass(output):
        return next((name for name in _KNOWN if name in output), None)
    if _is_dataclass(output) or hasattr(output, "_fields"):
        return next((name for name in _KNOWN if hasattr(output, name)), None)
    return 0 if isinstance(output, (tuple, list)) and len(output) == 1 else None


def _part(output: Any, place: str | int) -> Any:
    try:
        if isinstance(output, Tensor):
            raise KeyError(place)
        if isinstance(place, str) and (_is_dataclass(output) or not isinstance(output, Mapping)):
            return getattr(output, place)
        return output[place]
    except (AttributeError, IndexError, KeyError, TypeError):
        raise InputError(f"output={place!r} is no part of what the model returned: {_describe(output)}") from None


def _with_part(output: Any, place: str | int, value: Any) -> Any:
    if _is_dataclass(output):
        name = place if isinstance(place, str) else list(output)[place]  # dataclasses with positions are mappings too
        return dataclasses.replace(output, **{name: value})
    if isinstance(output, Mapping):
        return _with_items(output, {place: value})
    if isinstance(place, int):
        values = list(output)
        values[place] = value
        return _like(output, values)
    if isinstance(output, tuple):
        return output._replace(**{place: value})  # type: ignore[attr-defined]
    made = copy.copy(output)
    setattr(made, place, value)
    return made


def _with_items(output: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if not isinstance(output, MutableMapping):
        return type(output)({**output, **items})  # type: ignore[call-arg]
    made = copy.copy(output)
    made.update(items)
    return made


def _like(output: tuple[Any, ...] | list[Any], values: list[Any]) -> Any:
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def _is_dataclass(output: Any) -> bool:
    return dataclasses.is_dataclass(output) and not isinstance(output, type)


# -- what messages say


def _no_logits(found: Any, named: str, select: Select) -> str:
    message = f"{named} {_describe(found)}; adaptation reads logits of shape (B, C) or (B, C, H, W)"
    if select is not None:
        return f"{message}, so output= must name such a tensor, or return it"
    if isinstance(found, Tensor):
        return f"{message}, classes in dimension 1"
    return (
        f"{message} from a tensor or from the key or field 'logits' (or 'out'): say which part they are with output=, "
        "a key, a position or a function of what the model returned"
    )


def _describe(output: Any) -> str:
    """Return a few words on what a structure is and has."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    name = type(output).__name__
    if _is_dataclass(output):
        given = [field.name for field in dataclasses.fields(output) if getattr(output, field.name, None) is not None]
        return f"a {name} with the fields {', '.join(given) or 'none'}"
    if isinstance(output, Mapping):
        return f"a {name} with the keys {', '.join(map(repr, output)) or 'none'}"
    if isinstance(output, (tuple, list)):
        return f"a {name} of {len(output)} ({', '.join(_short(part) for part in output[:8])})"
    return "None" if output is None else f"a {name}"


def _short(part: Any) -> str:
    return f"a tensor {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
