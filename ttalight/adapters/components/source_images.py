"""Images of the source, for methods that measure something on them before they adapt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ttalight.errors import InputError, InputTypeError
from ttalight.seeding import derive_seed

__all__ = ["SourceBatch", "SourceImages", "validation_batches"]


class SourceBatch(NamedTuple):
    """A batch of the source.

    Args:
        images: (B, 3, H, W), as the network takes them.
        labels: Classes, int64 (B,). None where the batch has none.
    """

    images: Tensor
    labels: Tensor | None


class SourceImages:
    """Gives batches of source images: those of the user, or the clean validation images of a run's data module.

    Args:
        given: Batches of images (B, 3, H, W), or tuples that begin with them; None for the data module's.
    """

    def __init__(self, given: Iterable[Any] | None) -> None:
        self.given = given
        #: The trainer of the run in progress.
        self.trainer: Trainer | None = None
        self._are_read = False

    def batches(self, count: int, seed: int) -> Iterator[SourceBatch] | None:
        """Return batches of at most ``count`` images together; None where there is no source of them.

        Args:
            count: Number of images.
            seed: Of the draw from the validation images.

        Raises:
            TypeError: If a batch holds no images.
            ValueError: If there is no batch.
        """
        self._are_read = True
        batches: Iterable[Any] | None = self.given
        if batches is None and self.trainer is not None:
            generator = torch.Generator().manual_seed(derive_seed(seed, "source images"))
            batches = validation_batches(self.trainer, count, generator)
        return None if batches is None else _first(batches, count)

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a network that is being adapted need the images no more, which often cannot be copied.
        return {"given": None if self._are_read else self.given, "trainer": None, "_are_read": self._are_read}


def _first(batches: Iterable[Any], count: int) -> Iterator[SourceBatch]:
    seen = 0
    for batch in batches:
        images = _images_in(batch)[: count - seen]
        labels = _labels_in(batch)
        seen += len(images)
        yield SourceBatch(images, None if labels is None else labels[: len(images)])
        if seen >= count:
            return
    if seen == 0:
        raise InputError(
            "source gave no batch of images: give an iterable that can be read again for every run, such as a list or "
            "a DataLoader"
        )


def validation_batches(trainer: Trainer, count: int, generator: torch.Generator) -> Iterator[Any] | None:
    """Return batches of the clean validation images of a run's data module, on the device; None where it has none.

    Images are drawn at random where the loader's data can be, since files in order are often sorted by class.

    Args:
        trainer: The trainer of the run.
        count: Number of images to draw.
        generator: On the CPU.
    """
    data: LightningDataModule | None = getattr(trainer, "datamodule", None)
    if data is None or type(data).val_dataloader is LightningDataModule.val_dataloader:
        return None
    if not getattr(data, "has_validation", True):
        return None
    try:
        data.setup("validate")
    except FileNotFoundError:
        return None
    loader = data.val_dataloader()
    if isinstance(loader, (list, tuple)):
        loader = loader[0] if loader else None
    if loader is None:
        return None
    if isinstance(loader, DataLoader) and loader.batch_size and not isinstance(loader.dataset, IterableDataset):
        chosen = torch.randperm(len(loader.dataset), generator=generator)[:count].tolist()  # type: ignore[arg-type]
        loader = DataLoader(
            loader.dataset,
            loader.batch_size,
            sampler=chosen,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            generator=generator,
        )
    return map(trainer.strategy.batch_to_device, loader)


def _images_in(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        seen = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputTypeError(
            "source must give batches of images, floats of shape (B, 3, H, W) as the network takes them, or tuples "
            f"that begin with them; got {seen}"
        )
    return images


def _labels_in(batch: Any) -> Tensor | None:
    """Return the labels of a batch, that is, whole numbers, one for each image, in the second place."""
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != batch[0].shape[:1]:
        return None
    return labels.long()
