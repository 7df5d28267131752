"""Test-time training and test-time adaptation with PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ttalight import compat as _compat
from ttalight.version import __version__

if TYPE_CHECKING:
    from ttalight.trainer import Trainer

_compat.import_torchvision()

__all__ = ["Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the trainer, and Lightning with it, where it is first used."""
    if name == "Trainer":
        from ttalight.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'ttalight' has no attribute {name!r}")
