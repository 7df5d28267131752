"""Recorder, checkpoints of an adaptation, end on SIGTERM, progress bar; methods are in ``ttalight.adapters``."""

from ttalight.callbacks.activation_statistics import ActivationStatistics
from ttalight.callbacks.adaptation_checkpoint import AdaptationCheckpoint
from ttalight.callbacks.progress import Progress
from ttalight.callbacks.recorder import Recorder
from ttalight.callbacks.resumed_checkpoint import ResumedCheckpoint
from ttalight.callbacks.termination import Termination

__all__ = ["ActivationStatistics", "AdaptationCheckpoint", "Progress", "Recorder", "ResumedCheckpoint", "Termination"]
