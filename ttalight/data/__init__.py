"""Data modules, streams and corruptions: what arrives, and in which order."""

from ttalight.data.arrays import ImageArrays, StreamDataset
from ttalight.data.cifar import CIFARDataModule
from ttalight.data.corrupted import CorruptedDataModule
from ttalight.data.digits import DigitsDataModule
from ttalight.data.image_folder import ImageFolderDataModule
from ttalight.data.layout import CorruptedFolder
from ttalight.data.module import ImageDataModule
from ttalight.data.stream import Domain, PerDomain, Stream, StreamOrder, StreamSampler, Visit

__all__ = [
    "CIFARDataModule",
    "CorruptedDataModule",
    "CorruptedFolder",
    "DigitsDataModule",
    "Domain",
    "ImageArrays",
    "ImageDataModule",
    "ImageFolderDataModule",
    "PerDomain",
    "Stream",
    "StreamDataset",
    "StreamOrder",
    "StreamSampler",
    "Visit",
]
