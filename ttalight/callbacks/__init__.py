"""Recorder, checkpoints of an adaptation and progress bar; adaptation methods are in ``ttalight.adapters``."""

from ttalight.callbacks.adaptation_checkpoint import AdaptationCheckpoint
from ttalight.callbacks.progress import Progress
from ttalight.callbacks.recorder import Recorder

__all__ = ["AdaptationCheckpoint", "Progress", "Recorder"]
