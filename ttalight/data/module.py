"""The base of image data modules: loaders, streams over corrupted domains, and the cast on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ttalight.arguments import arguments_of, shown_arguments
from ttalight.data.arrays import ImageArrays, StreamDataset
from ttalight.data.corruptions import FROST_PROCEDURAL, corrupt, frost_source
from ttalight.data.image_files import ImageFiles, as_is
from ttalight.data.partial_loader import PartialLoader
from ttalight.data.streams import Domain, PerDomain, Stream, StreamOrder, StreamSampler
from ttalight.errors import InputError
from ttalight.seeding import global_seed

__all__ = ["ImageDataModule", "Split"]

Split = Literal["train", "validation", "test"]

#: What training images may take of a GPU's free memory; the rest is the network's.
_SHARE_OF_FREE_MEMORY = 0.25


class ImageDataModule(LightningDataModule, ABC):
    """Data module over labelled image sets; subclasses say where the images come from.

    Loaders yield ``(image, label)``: uint8 RGB until the batch is on the device, float in [0, 1] from then on. While a
    GPU trains, images that are in memory and take at most a quarter of its free memory are held there.
    ``test_dataloader`` and ``predict_dataloader`` deliver one stream over the domains named by ``domains``.

    Args:
        batch_size: Samples in a batch, of training and of the stream.
        domains: Names of the stream's domains: corruptions, or ``clean``.
        severity: Severity of the corruptions, 1 to 5.
        stream: Order in which the domains' samples arrive; ``PerDomain()`` by default. Where it needs the clean images
            beside the domains, or several severities, it gets them.
        stream_split: Split that the stream's images come from. Hyper-parameters are chosen on ``validation``.
        limit: Use only the first so many images of that split in every domain, ``clean`` among them.
        seed: Seed of the corruptions and of the stream. The order of the training samples follows the global seed.
        frost_dir: Folder with the original pictures of frost. Without it frost is made of procedural textures, and
            the domain's name in results is ``frost_procedural``.
    """

    num_classes: int
    #: Channel means and standard deviations that suit the images; a task without its own takes these.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    #: Table of corruption parameters that fits the images' size.
    corruption_table: str = "cifar"
    #: Images that share a generator while they are corrupted; another number gives other draws.
    corruption_chunk: int = 1000
    #: Processes that read batches of training and validation images; 0 reads in this one.
    num_workers: int = 0
    #: Whether there are images to validate on.
    has_validation: bool = True

    def __init__(
        self,
        batch_size: int = 256,
        domains: Sequence[str] = ("clean",),
        severity: int = 5,
        stream: StreamOrder | None = None,
        stream_split: Literal["validation", "test"] = "test",
        limit: int | None = None,
        seed: int = 0,
        frost_dir: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if not domains:
            raise InputError("domains is empty: name at least one corruption, or 'clean'")
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, got {limit}")
        self.batch_size = batch_size
        self.domains = tuple(domains)
        self.severity = severity
        self.order = stream if stream is not None else PerDomain()
        self.stream_split = stream_split
        self.limit = limit
        self.seed = seed
        self.frost_dir = frost_dir
        #: Whether training batches carry the samples' indices as a third field; a task that caches sets this.
        self.with_index = False
        #: Batch of the stream that the test loader starts with; a run that is resumed sets it.
        self.start_batch = 0
        #: Numbers of the batches that the test loader delivers, where several processes divide the stream.
        self.share: npt.NDArray[np.int64] | None = None
        self.train_set: ImageArrays | ImageFiles | None = None
        self.validation_set: ImageArrays | ImageFiles | None = None
        self.stream: Stream | None = None
        self._stream_set: StreamDataset | None = None

    def __repr__(self) -> str:
        stream = "" if type(self.order) is PerDomain else f"stream={self.order!r}"
        own = shown_arguments(self, {name: value for name, value in arguments_of(self).items() if name != "stream"})
        return f"{type(self).__name__}({', '.join(filter(None, [own, stream]))})"

    __str__ = __repr__

    @abstractmethod
    def load(self, split: Split) -> ImageArrays:
        """Return the clean images of a split, in memory."""

    def open(self, split: Split) -> ImageArrays | ImageFiles:
        """Return the clean images of a split as training and validation read them."""
        return self.load(split)

    def setup(self, stage: str) -> None:
        """Load what a stage needs; called by the Trainer."""
        if stage == "fit" and self.train_set is None:
            self.train_set = self.open("train")
        if (stage == "validate" or (stage == "fit" and self.has_validation)) and self.validation_set is None:
            self.validation_set = self.open("validation")
        if stage in ("test", "predict") and self._stream_set is None:
            self._setup_stream()

    def _setup_stream(self) -> None:
        domains, sets = zip(*self.load_domains(), strict=True)
        self.stream = self.order.build(domains, [part.labels.numpy() for part in sets], self.batch_size, self.seed)
        self._stream_set = StreamDataset(self.stream, sets)

    def stream_domains(self) -> list[tuple[str, int]]:
        """Return name and severity (0 for ``clean``) of each domain that the stream is made of.

        These are ``domains``, each at the severities that the stream asks for; after them ``clean``, if it wants that.
        """
        levels = self.order.severities(self.severity)
        wanted = [(name, level) for name in self.domains for level in ((0,) if name == "clean" else levels)]
        return [*wanted, ("clean", 0)] if self.order.needs_clean else wanted

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order, with their images."""
        clean = self.load(self.stream_split)
        labels = clean.labels[: self.limit]
        wanted = self.stream_domains()
        images = {key: ImageArrays(self.corrupted(clean.images, *key), labels) for key in dict.fromkeys(wanted)}
        return [(self.domain(*key), images[key]) for key in wanted]

    def domain(self, name: str, severity: int | None = None) -> Domain:
        """Return the domain that images which this module corrupts itself belong to.

        Args:
            name: Name of the corruption, or ``clean``.
            severity: Severity of the corruption; that of the module by default.
        """
        if name == "clean":
            return Domain(name)
        if name == "frost" and frost_source(self.frost_dir) == FROST_PROCEDURAL:
            name = f"frost_{FROST_PROCEDURAL}"
        return Domain(name, self.severity if severity is None else severity)

    def corrupted(self, clean: Tensor, name: str, severity: int | None = None) -> Tensor:
        """Return the first ``limit`` images of the corrupted set; those of any limit are the same.

        Args:
            clean: The clean images, uint8 (N, 3, H, W).
            name: Name of the corruption, or ``clean``.
            severity: Severity of the corruption; that of the module by default.
        """
        if name != "clean":
            clean = corrupt(
                clean[: self.clean_needed(len(clean))],
                name,
                self.severity if severity is None else severity,
                seed=self.seed,
                table=self.corruption_table,
                frost_dir=self.frost_dir,
                chunk_size=self.corruption_chunk,
            )
        return clean[: self.limit]

    def clean_needed(self, count: int) -> int:
        """Return how many of ``count`` clean images it takes to corrupt ``limit``: whole chunks share their draws."""
        if self.limit is None:
            return count
        return min(count, -(-self.limit // self.corruption_chunk) * self.corruption_chunk)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training loader; its order is a function of (global seed, epoch), whatever ran before."""
        assert self.train_set is not None, "setup('fit') comes first"
        self.train_set.with_index = self.with_index
        trainer = self.trainer
        self._hold_on_device(self.train_set)
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            self.train_set,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            shuffle=True,
            seed=global_seed(),
            drop_last=True,
        )
        return self._loader(self.train_set, sampler=sampler, drop_last=True)

    def _hold_on_device(self, images: ImageArrays | ImageFiles) -> None:
        device = self._device
        if device.type != "cuda" or self.num_workers > 0 or not isinstance(images, ImageArrays):
            return  # forked workers have no use of a GPU
        if images.images.nbytes <= _SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]:
            images.to(device)

    @property
    def _device(self) -> torch.device:
        """The device of batches. A GPU takes them from pinned memory while the host continues."""
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    def teardown(self, stage: str) -> None:
        """Take the training images back from the GPU."""
        if stage == "fit" and isinstance(self.train_set, ImageArrays):
            self.train_set.to("cpu")

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]] | list[Any]:
        """Return the clean validation images in order; an empty list where there are none to validate on."""
        if self.validation_set is None and not self.has_validation:
            return []
        assert self.validation_set is not None, "setup('validate') comes first"
        return self._loader(self.validation_set)

    def _loader(self, images: ImageArrays | ImageFiles, **kwargs: Any) -> DataLoader[tuple[Tensor, ...]]:
        held = isinstance(images, ImageArrays) and images.images.device.type != "cpu"
        return DataLoader(
            images,
            self.batch_size,
            collate_fn=as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._device.type == "cuda" and not held,
            **kwargs,
        )

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | PartialLoader:
        """Return the stream, from ``start_batch`` on, or this process's share of it."""
        loader = self._stream_loader()
        return PartialLoader(loader) if self.start_batch or self.share is not None else loader

    def _stream_loader(self, num_workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
        assert self._stream_set is not None, "setup('test') comes first"
        sampler = StreamSampler(self._stream_set.stream, self.start_batch, self.share)
        pinned = self._device.type == "cuda"
        return DataLoader(
            self._stream_set, batch_size=None, sampler=sampler, num_workers=num_workers, pin_memory=pinned
        )

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """Return the first batch of the stream, as its loader delivers it."""
        assert self._stream_set is not None, "setup('test') comes first"
        return self._stream_set[self._stream_set.stream.batch(0)]

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | PartialLoader:
        """Return the stream, as ``test_dataloader`` does."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the images of a batch from uint8 to float in [0, 1], on the device, of the trainer's precision."""
        images, *rest = batch
        images = images.to(torch.float32).div_(255)
        if self.trainer is not None:
            images = self.trainer.precision_plugin.convert_input(images)
        return (images, *rest)
