"""Test-time training and test-time adaptation with PyTorch Lightning."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ttalight.compat import mend_torchvision
from ttalight.version import __version__

if TYPE_CHECKING:
    from ttalight import (  # noqa: F401
        adapters,
        analysis,
        callbacks,
        data,
        doctor,
        engine,
        losses,
        metrics,
        models,
        monitoring,
        reporting,
        tasks,
        transforms,
    )
    from ttalight.trainer import Trainer

mend_torchvision()

__all__ = ["Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the trainer, and Lightning with it, where it is first used; subpackages as well."""
    if name == "Trainer":
        from ttalight.trainer import Trainer

        return Trainer
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'ttalight' has no attribute {name!r}")
