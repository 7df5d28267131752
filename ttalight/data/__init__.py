"""Data modules, streams and corruptions: what arrives, and in which order."""

from ttalight.data.arrays import ImageArrays, StreamDataset
from ttalight.data.digits import DigitsDataModule
from ttalight.data.module import ImageDataModule
from ttalight.data.stream import Domain, PerDomain, Stream, StreamOrder, StreamSampler, Visit

__all__ = [
    "DigitsDataModule",
    "Domain",
    "ImageArrays",
    "ImageDataModule",
    "PerDomain",
    "Stream",
    "StreamDataset",
    "StreamOrder",
    "StreamSampler",
    "Visit",
]
