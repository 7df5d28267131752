"""Forwards of modules, replaced for a while in a way that copies and files of the modules do not see."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

__all__ = ["attach_forward", "detach_forward"]

#: Attributes of a module whose forward is replaced: the replacement, and the forward that its instance carried.
_FORWARD, _CARRIED = "_ttalight_forward", "_ttalight_carried_forward"


def attach_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of a module.

    The module gets a subclass of its own class, as ``torch.nn.utils.parametrize`` does it. Copies and pickles of the
    module are of its own class and have its own forward.

    Args:
        module: The module.
        forward: Takes what the module's own forward takes.
    """
    own = vars(module)
    if _FORWARD not in own:
        if "forward" in own:
            own[_CARRIED] = own.pop("forward")
        module.__class__ = _attached_class(type(module))  # type: ignore[arg-type]
    own[_FORWARD] = forward


def detach_forward(module: nn.Module) -> None:
    """Restore the forward that a module had before ``attach_forward``; nothing happens where it is not attached."""
    own = vars(module)
    if own.pop(_FORWARD, None) is None:
        return
    module.__class__ = type(module).__bases__[0]
    if _CARRIED in own:
        own["forward"] = own.pop(_CARRIED)


@cache
def _attached_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_FORWARD](*args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in (_FORWARD, _CARRIED)}
        if _CARRIED in vars(self):
            state["forward"] = vars(self)[_CARRIED]
        return copyreg.__newobj__, (original,), state  # type: ignore[attr-defined]

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (original,), {"forward": forward, "__reduce_ex__": reduce, **names})
