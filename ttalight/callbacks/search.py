"""Callbacks of a trainer, by their class."""

from __future__ import annotations

from typing import TypeVar

from lightning import Callback, Trainer

from ttalight.errors import UsageError

__all__ = ["callbacks_of", "find_callback", "find_callbacks", "get_callback"]

C = TypeVar("C", bound=Callback)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def find_callbacks(trainer: Trainer, kind: type[C]) -> list[C]:
    """Return the callbacks of a class, in their order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """Return the first callback of a class, None if there is none."""
    return next(iter(find_callbacks(trainer, kind)), None)


def get_callback(trainer: Trainer, kind: type[C]) -> C:
    """Return the first callback of a class.

    Raises:
        UsageError: If there is none.
    """
    callback = find_callback(trainer, kind)
    if callback is None:
        raise UsageError(f"the trainer has no {kind.__name__} among its callbacks: add one")
    return callback
