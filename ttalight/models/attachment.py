"""Forwards of modules, replaced for a while in a way that copies and files of the modules do not see."""

from __future__ import annotations

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
    module are of its own class and have its own forward.

    Args:
        module: The module.
        forward: Takes what the module's own forward takes.
    """
    detach_forward(module)
    own, original = vars(module), type(module)
    own[_ATTACHED] = True
    if "forward" in own:
        own[_CARRIED] = own.pop("forward")
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    functions = {"forward": staticmethod(forward), "__reduce_ex__": _reduce_as_original}
    module.__class__ = type(original.__name__, (original,), names | functions)


def detach_forward(module: nn.Module) -> None:
    """Restore the forward that a module had before ``attach_forward``; nothing happens where it is not attached."""
    own = vars(module)
    if own.pop(_ATTACHED, None) is None:
        return
    module.__class__ = type(module).__bases__[0]
    if _CARRIED in own:
        own["forward"] = own.pop(_CARRIED)


def _reduce_as_original(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    state = {name: value for name, value in vars(module).items() if name not in (_ATTACHED, _CARRIED)}
    if _CARRIED in vars(module):
        state["forward"] = vars(module)[_CARRIED]
    return copyreg._reconstructor, (type(module).__bases__[0], object, None), state  # type: ignore[attr-defined]
