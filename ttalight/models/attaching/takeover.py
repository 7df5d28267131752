"""Modules that are taken over temporarily: flags and gradients are restored, and no part has two owners."""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from ttalight.errors import InputError, UsageError
from ttalight.models.parts import all_modules

__all__ = ["Takeover", "check_free", "check_loaded", "owner_of", "release"]


class Owner(Protocol):
    """Owner of a module that it can release."""

    def release(self) -> nn.Module:
        """Return the module as it was."""
        ...


#: Owners by the modules that they have taken over, parts included.
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def owner_of(module: nn.Module) -> Owner | None:
    """Return the owner of a module, None if it has none."""
    reference = _owners.get(module)
    return None if reference is None else reference()


def release(network: nn.Module) -> nn.Module:
    """Stop the adaptation of a network whose handle is lost, and return the network as ``Adapter.wrap`` got it."""
    for part in all_modules(network):
        if owner := owner_of(part):
            owner.release()
    return network


class Takeover:
    """Takes a module over: eval mode, no gradients, and registered as its owner's.

    Args:
        module: The module.
        owner: Its owner. It is not kept alive.

    Raises:
        RuntimeError: If the module, or a part of it, has an owner already.
    """

    def __init__(self, module: nn.Module, owner: Owner) -> None:
        check_free(module)
        _owners.update((part, weakref.ref(owner)) for part in all_modules(module))
        self._training = [(part, part.training) for part in all_modules(module)]
        self._flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
        for parameter, _, _ in self._flags:
            parameter.grad = None
        module.eval()

    @property
    def training(self) -> bool:
        """The training mode that ``end`` restores of the module itself."""
        return self._training[0][1]

    def train(self, module: nn.Module, mode: bool) -> None:
        """Change the modes that ``end`` restores as ``module.train(mode)`` would; the module stays in eval mode."""
        for part, training in self._training:
            part.training = training
        module.train(mode)
        self._training = [(part, part.training) for part in all_modules(module)]
        module.eval()

    def end(self) -> None:
        """Restore training flags, gradient flags and gradients, and unregister the owner."""
        for part, training in self._training:
            part.training = training
            _owners.pop(part, None)
        for parameter, requires_grad, gradient in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    def restore_copy(self, module: nn.Module) -> None:
        """Set flags and gradients of a copy of the module to those before the takeover."""
        for part, (_, training) in zip(all_modules(module), self._training, strict=True):
            part.training = training
        for parameter, (_, requires_grad, gradient) in zip(module.parameters(), self._flags, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = None if gradient is None else gradient.clone()


def check_free(module: nn.Module) -> None:
    """Check that neither a module nor a part of it has an owner.

    Raises:
        RuntimeError: If one has.
    """
    for name, part in module.named_modules():
        if owner_of(part) is not None:
            what = f"{type(module).__name__}" + (f", its part {name}," if name else "")
            raise UsageError(
                f"{what} is being adapted already: call release() of what wrap() returned, or "
                "ttalight.adapters.release(network) where that is lost"
            )
    # A list, because garbage collection can remove keys during the iteration.
    parts = [part for reference in _owners.keyrefs() if (part := reference()) is not None]
    taken = {id(value) for part in parts if owner_of(part) for value in part._parameters.values()} - {id(None)}
    for name, parameter in module.named_parameters():
        if id(parameter) in taken:
            raise UsageError(
                f"{name} of {type(module).__name__} belongs to another network as well, which is being adapted: call "
                "release() of what wrap() returned for that"
            )


def check_loaded(module: nn.Module) -> None:
    """Check that the weights and buffers of a module have values.

    Raises:
        ValueError: If one has none.
    """
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            raise InputError(
                f"{name} of {type(module).__name__} has no shape yet: pass a batch through the network first"
            )
        if value.is_meta:
            raise InputError(
                f"{name} of {type(module).__name__} is on the meta device, where it has no values: load it, and "
                "remove hooks that move weights out of the network between passes"
            )
