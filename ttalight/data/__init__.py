"""Data modules, streams and corruptions: what arrives, and in which order."""

from ttalight.data.arrays import ImageArrays, StreamDataset
from ttalight.data.cifar import CIFARDataModule
from ttalight.data.corrupted import CorruptedDataModule
from ttalight.data.digit_sets import DigitSetsDataModule
from ttalight.data.digits import DigitsDataModule
from ttalight.data.domain_folders import DomainFoldersDataModule
from ttalight.data.embeddings import EmbeddingsDataModule, save_embeddings
from ttalight.data.image_folder import ImageFolderDataModule
from ttalight.data.imagenet import ImageNetDataModule
from ttalight.data.layout import CorruptedFolder
from ttalight.data.module import ImageDataModule
from ttalight.data.segmentation import (
    ACDCDataModule,
    CamVidDataModule,
    CityscapesDataModule,
    SegmentationDataModule,
)
from ttalight.data.streams import (
    BatchMixing,
    Clocked,
    Continual,
    Correlated,
    Cross,
    Domain,
    Gradual,
    InOut,
    LabelShift,
    Mixed,
    PerDomain,
    Potpourri,
    PracticalTTA,
    Probed,
    Recurring,
    SavedStream,
    SingleSample,
    Stream,
    StreamOrder,
    StreamSampler,
    Visit,
)
from ttalight.data.tiny_imagenet import TinyImageNetDataModule
from ttalight.data.unlabelled_folder import UnlabelledFolderDataModule

__all__ = [
    "ACDCDataModule",
    "BatchMixing",
    "CIFARDataModule",
    "CamVidDataModule",
    "CityscapesDataModule",
    "Clocked",
    "Continual",
    "Correlated",
    "CorruptedDataModule",
    "CorruptedFolder",
    "Cross",
    "DigitSetsDataModule",
    "DigitsDataModule",
    "Domain",
    "DomainFoldersDataModule",
    "EmbeddingsDataModule",
    "Gradual",
    "ImageArrays",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "InOut",
    "LabelShift",
    "Mixed",
    "PerDomain",
    "Potpourri",
    "PracticalTTA",
    "Probed",
    "Recurring",
    "SavedStream",
    "SegmentationDataModule",
    "SingleSample",
    "Stream",
    "StreamDataset",
    "StreamOrder",
    "StreamSampler",
    "TinyImageNetDataModule",
    "UnlabelledFolderDataModule",
    "Visit",
    "save_embeddings",
]
