"""Arguments of constructors: numbers are checked before anything is computed from them, and ``repr`` shows them."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from ttalight.errors import InputError, InputTypeError

__all__ = ["CheckedArguments", "arguments_of", "shown_arguments"]

#: Types that are checked, and their names; what else an argument may be, its class checks.
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "None",
    Sequence[int]: "a list of whole numbers",
    Sequence[str]: "a list of names",
}


class CheckedArguments:
    """A base whose subclasses refuse arguments that are annotated as numbers and are none, with a TypeError.

    NaN is a ValueError; a bool is no int. ``given_arguments`` are those that an object was made with.
    """

    given_arguments: Mapping[str, Any] = types.MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _checked(cls.__init__)  # type: ignore[method-assign]


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self).__init__ is checked:
            _check_names(type(self), kwargs)
        try:
            given = signature.bind_partial(self, *args, **kwargs).arguments
        except TypeError:  # the constructor says it better
            given = {}
        for name, kinds in _plain_hints(init).items():
            if name in given and not any(_fits(given[name], kind) for kind in kinds):
                value, expected = given[name], " or ".join(_NAMES[kind] for kind in kinds)
                seen = f"{value!r:.60}, a {type(value).__name__}"
                raise InputTypeError(f"{type(self).__name__}: {name} must be {expected}, got {seen}")
        if type(self).__init__ is checked:
            plain = {name: value for name, value in given.items() if name not in ("self", "kwargs")}
            plain |= given.get("kwargs", {})
            # An iterator is read once, and cannot be copied.
            vars(self)["given_arguments"] = {k: value for k, value in plain.items() if not isinstance(value, Iterator)}
        init(self, *args, **kwargs)
        odd = [name for name, value in given.items() if isinstance(value, float) and math.isnan(value)]
        if odd:  # the bounds of the constructor have not said so
            raise InputError(f"{type(self).__name__}: {odd[0]} must be a number, got nan")

    return checked


def _check_names(cls: type, given: Iterable[str]) -> None:
    """Refuse names that no constructor of a class has."""
    known = set(_parameters(cls))
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known - {"self", "args", "kwargs"}, n=1, cutoff=0.4)
        raise InputTypeError(f"{cls.__name__} has no argument {unknown}" + (f"; nearest: {near[0]}" if near else ""))


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of all constructors of a class, each as the most derived one has it."""
    signatures = [inspect.signature(owner.__init__) for owner in cls.__mro__ if "__init__" in vars(owner)]  # type: ignore[misc]
    return {name: value for signature in reversed(signatures) for name, value in signature.parameters.items()}


def arguments_of(made: object) -> dict[str, Any]:
    """Return the attributes of an object that are named like arguments of its constructors."""
    return {name: getattr(made, name) for name in _parameters(type(made)) if hasattr(made, name)}


def shown_arguments(made: object, given: Mapping[str, Any]) -> str:
    """Return the arguments of an object as a call shows them, without those that have their default values.

    Args:
        made: The object.
        given: Arguments by name.
    """
    known = _parameters(type(made))
    defaults = {name: known[name].default if name in known else inspect.Parameter.empty for name in given}
    return ", ".join(f"{name}={_short(value)}" for name, value in given.items() if not _is(value, defaults[name]))


def _is(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (int, float, str, tuple)) and value == default)


def _short(value: Any) -> str:
    name = type(value).__name__
    if callable(value) or repr(value).startswith(f"<{type(value).__module__}."):
        return getattr(value, "__name__", f"{name}(...)")
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"{name}(...)"


@functools.cache
def _plain_hints(init: Callable[..., None]) -> dict[str, tuple[Any, ...]]:
    """Return the types of each argument that takes these types only."""
    try:
        hints = get_type_hints(init)
    except NameError:  # a name that is known to type checkers only
        return {}
    found = {name: get_args(hint) if _is_union(hint) else (hint,) for name, hint in hints.items() if name != "return"}
    return {name: kinds for name, kinds in found.items() if all(kind in _NAMES for kind in kinds)}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _fits(value: Any, kind: Any) -> bool:
    if kind in (bool, types.NoneType):
        return isinstance(value, kind)
    if get_origin(kind) is not None:
        inner = get_args(kind)[0]
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(part, inner) for part in value)
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if isinstance(value, Integral):
        return abs(int(value)) < 2**63
    return kind is float and isinstance(value, Real)
