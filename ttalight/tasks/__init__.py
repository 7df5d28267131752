"""LightningModules: one training stage or test-time training method a file."""

from ttalight.tasks.alignment import AlignmentTask
from ttalight.tasks.base import BaseTask
from ttalight.tasks.clust3 import ClusT3
from ttalight.tasks.contrastive import ContrastiveTask
from ttalight.tasks.cross_task_ttt import CrossTaskTTT
from ttalight.tasks.embedding import EmbeddingTask
from ttalight.tasks.joint_task import JointTask
from ttalight.tasks.masked_autoencoder import MaskedAutoencoderTask
from ttalight.tasks.masked_ttt import MaskedTTT
from ttalight.tasks.nc_ttt import NCTTT
from ttalight.tasks.probe_task import ProbeTask
from ttalight.tasks.rec_ttt import ReCTTT
from ttalight.tasks.rotation_ttt import RotationTTT
from ttalight.tasks.segmentation import SegmentationTask
from ttalight.tasks.supervised import SupervisedTask
from ttalight.tasks.ttt_flow import TTTFlow
from ttalight.tasks.ttt_plus_plus import TTTPlusPlus
from ttalight.tasks.vision_language import VisionLanguageTask

__all__ = [
    "AlignmentTask",
    "BaseTask",
    "ClusT3",
    "ContrastiveTask",
    "CrossTaskTTT",
    "EmbeddingTask",
    "JointTask",
    "MaskedAutoencoderTask",
    "MaskedTTT",
    "NCTTT",
    "ProbeTask",
    "ReCTTT",
    "RotationTTT",
    "SegmentationTask",
    "SupervisedTask",
    "TTTFlow",
    "TTTPlusPlus",
    "VisionLanguageTask",
]
