"""What every image data module shares: loaders, streams over corrupted domains, and the cast on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ttalight.data.arrays import ImageArrays, StreamDataset
from ttalight.data.corruptions import corrupt
from ttalight.data.stream import Domain, PerDomain, Stream, StreamOrder, StreamSampler
from ttalight.seeding import global_seed

__all__ = ["ImageDataModule", "Split"]

Split = Literal["train", "validation", "test"]


class ImageDataModule(LightningDataModule, ABC):
    """Data module over image sets that fit into memory; subclasses say where the images come from.

    Loaders yield ``(image, label)``: uint8 RGB until the batch is on the device, float in [0, 1] from then on.
    ``test_dataloader`` and ``predict_dataloader`` deliver one stream over the domains named by ``domains``.

    Args:
        batch_size: Samples in a batch, of training and of the stream.
        domains: Names of the stream's domains: corruptions, or ``clean``.
        severity: Severity of the corruptions, 1 to 5.
        stream: Order in which the domains' samples arrive; ``PerDomain()`` by default.
        stream_split: Split that the stream's images come from. Hyper-parameters are chosen on ``validation``.
        limit: Use only the first so many images of that split in every domain.
        seed: Seed of the corruptions and of the stream. The order of the training samples follows the global seed.
    """

    num_classes: int
    #: Channel means and standard deviations that suit the images; a task without its own takes these.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    #: Table of corruption parameters that fits the images' size.
    corruption_table: str = "cifar"

    def __init__(
        self,
        batch_size: int = 256,
        domains: Sequence[str] = ("clean",),
        severity: int = 5,
        stream: StreamOrder | None = None,
        stream_split: Literal["validation", "test"] = "test",
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not domains:
            raise ValueError("domains is empty: name at least one corruption, or 'clean'")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.batch_size = batch_size
        self.domains = tuple(domains)
        self.severity = severity
        self.order = stream if stream is not None else PerDomain()
        self.stream_split = stream_split
        self.limit = limit
        self.seed = seed
        #: Whether training batches carry the samples' indices as a third field; a task that caches sets this.
        self.with_index = False
        self.train_set: ImageArrays | None = None
        self.validation_set: ImageArrays | None = None
        self.stream: Stream | None = None
        self._stream_set: StreamDataset | None = None

    @abstractmethod
    def load(self, split: Split) -> ImageArrays:
        """Return the clean images of a split."""

    def setup(self, stage: str) -> None:
        """Load what a stage needs; called by the Trainer."""
        if stage == "fit" and self.train_set is None:
            self.train_set = self.load("train")
        if stage in ("fit", "validate") and self.validation_set is None:
            self.validation_set = self.load("validation")
        if stage in ("test", "predict") and self._stream_set is None:
            self._setup_stream()

    def _setup_stream(self) -> None:
        clean = self.load(self.stream_split)
        images, labels = clean.images[: self.limit], clean.labels[: self.limit]
        domains = [Domain(name, 0 if name == "clean" else self.severity) for name in self.domains]
        sets = [ImageArrays(self._corrupted(images, domain), labels) for domain in domains]
        self.stream = self.order.build(domains, [part.labels.numpy() for part in sets], self.batch_size, self.seed)
        self._stream_set = StreamDataset(self.stream, sets)

    def _corrupted(self, images: Tensor, domain: Domain) -> Tensor:
        if domain.name == "clean":
            return images
        return corrupt(images, domain.name, domain.severity, seed=self.seed, table=self.corruption_table)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training loader; its order is a function of (global seed, epoch), whatever ran before."""
        assert self.train_set is not None, "setup('fit') comes first"
        self.train_set.with_index = self.with_index
        trainer = self.trainer
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            self.train_set,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            shuffle=True,
            seed=global_seed(),
            drop_last=True,
        )
        return DataLoader(self.train_set, self.batch_size, sampler=sampler, drop_last=True, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the clean validation images in order."""
        assert self.validation_set is not None, "setup('validate') comes first"
        return DataLoader(self.validation_set, self.batch_size, collate_fn=_as_is)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the stream."""
        assert self._stream_set is not None, "setup('test') comes first"
        sampler = StreamSampler(self._stream_set.stream)
        return DataLoader(self._stream_set, batch_size=None, sampler=sampler)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the stream."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the images of a batch from uint8 to float in [0, 1], on the device."""
        images, *rest = batch
        return (images.to(torch.float32).div_(255), *rest)


def _as_is(batch: Any) -> Any:
    return batch
