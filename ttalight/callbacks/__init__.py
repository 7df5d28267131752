"""Recorder and progress bar; adaptation methods are in ``ttalight.adapters``."""

from ttalight.callbacks.progress import Progress
from ttalight.callbacks.recorder import Recorder

__all__ = ["Progress", "Recorder"]
