"""LightningModules: one training stage or test-time training method a file."""

from ttalight.tasks.alignment import AlignmentTask
from ttalight.tasks.base import BaseTask
from ttalight.tasks.contrastive import ContrastiveTask
from ttalight.tasks.cross_task_ttt import CrossTaskTTT
from ttalight.tasks.supervised import SupervisedTask

__all__ = ["AlignmentTask", "BaseTask", "ContrastiveTask", "CrossTaskTTT", "SupervisedTask"]
