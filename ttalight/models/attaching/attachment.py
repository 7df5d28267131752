"""Forwards of modules, replaced temporarily in a way that copies and files of the modules do not see."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["attach_forward", "detach_forward"]

#: Attributes of a module whose forward is replaced: whether it is, and the forward that its instance carried.
_ATTACHED, _CARRIED = "_ttalight_attached", "_ttalight_carried_forward"


def attach_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of a module.

    The module gets a subclass of its own class, as ``torch.nn.utils.parametrize`` does it. Copies and pickles of the
    module are of its own class, made in that class's way, and have its own forward.

    Args:
        module: The module.
        forward: Takes what the module's own forward takes.
    """
    detach_forward(module)
    original = type(module)
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    functions = {
        name: _as_original(name) for name in ("__reduce_ex__", "__copy__", "__deepcopy__") if hasattr(original, name)
    }
    functions["forward"] = staticmethod(forward)
    _set_attached(module, type(original.__name__, (original,), names | functions))


def detach_forward(module: nn.Module) -> None:
    """Restore the forward that a module had before ``attach_forward``; nothing happens where it is not attached."""
    own = vars(module)
    if own.pop(_ATTACHED, None) is None:
        return
    module.__class__ = type(module).__bases__[0]
    if _CARRIED in own:
        own["forward"] = own.pop(_CARRIED)


def _set_attached(module: nn.Module, attached: type[nn.Module]) -> None:
    own = vars(module)
    own[_ATTACHED] = True
    if "forward" in own:
        own[_CARRIED] = own.pop("forward")
    module.__class__ = attached


def _as_original(name: str) -> Callable[..., Any]:
    """Return a method that is the one of the original class, called while the module is of that."""

    def call(module: nn.Module, *args: Any) -> Any:
        attached = type(module)
        detach_forward(module)
        try:
            made = getattr(module, name)(*args)
            return _independent(made) if name == "__reduce_ex__" and isinstance(made, tuple) else made
        finally:
            _set_attached(module, attached)

    return call


def _independent(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a reduction that holds when the module is of another class and has other attributes again."""
    make, args, *rest = reduced
    if make is copyreg.__newobj__ and len(args) == 1:  # type: ignore[attr-defined]  # pickle compares its class
        make, args = copyreg._reconstructor, (args[0], object, None)  # type: ignore[attr-defined]
    return make, args, *map(_with_own_dicts, rest)


def _with_own_dicts(state: Any) -> Any:
    if type(state) is tuple:
        return tuple(map(_with_own_dicts, state))
    return copy.copy(state) if isinstance(state, dict) else state
