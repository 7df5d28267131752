"""Callbacks of a trainer, by their class."""

from __future__ import annotations

from typing import TypeVar

from lightning import Callback, Trainer

__all__ = ["callbacks_of", "find_callback"]

C = TypeVar("C", bound=Callback)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """Return the first callback of a class, None if there is none."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)
