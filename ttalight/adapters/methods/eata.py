"""EATA: ETA with a penalty that keeps the weights that matter on source images near the source."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ttalight.adapters.components.regularization import drift
from ttalight.adapters.methods.eta import ETA
from ttalight.adapters.parameter_vector import flatten
from ttalight.models.network import Network
from ttalight.seeding import derive_seed

__all__ = ["EATA"]


class EATA(ETA):
    """ETA with ``fisher_weight`` times the drift from the source weights, each weight by its Fisher information.

    The Fisher information is the mean over batches of the squared gradient of a batch's cross-entropy to the network's
    own labels, at the source weights and with the statistics that the method adapts with. It takes one forward and
    one backward for each of these batches, then ETA's one forward and one backward a batch.

    ``fisher="source"`` reads source images once, when the first batch arrives: the batches of ``source``, or in a
    Lightning run images of the data module's validation set, drawn at random. Labels are not used. Without any the
    method says so and runs as ETA. ``fisher="stream"`` needs none: until ``fisher_samples`` images of the stream have
    been seen, each batch is first passed forward and backward through the source weights; a reset begins anew.

    Source: S. Niu, J. Wu, Y. Zhang, Y. Chen, S. Zheng, P. Zhao, M. Tan, *Efficient Test-Time Model Adaptation without
    Forgetting*, ICML 2022, arXiv 2204.02610. The settings for CIFAR are those of the benchmark of R. Marsden, M.
    Döbler, B. Yang, arXiv 2306.00650. The authors take the images of their test set without corruptions; ``stream``
    is ours. See ``ETA`` for other differences.

    Args:
        source: Batches of source images (B, 3, H, W), or tuples that begin with them, as the network's forward takes
            them; read once a run, so lists and data loaders serve any number of runs.
        fisher: Where the Fisher information comes from.
        fisher_samples: Number of images that it is measured on.
        fisher_weight: Weight of the penalty; 0 is ETA.
        kwargs: See ``ETA``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if ``source`` gives no images.
        TypeError: At the first batch, if ``source`` gives something else than images.
    """

    shards_batches = True

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {**ETA.published["cifar"], "fisher_weight": 1.0},
        "cifar100": {**ETA.published["cifar100"], "fisher_weight": 1.0},
        "imagenet": {**ETA.published["imagenet"], "fisher_weight": 2000.0},
    }

    def __init__(
        self,
        source: Iterable[Any] | None = None,
        fisher: Literal["source", "stream"] = "source",
        fisher_samples: int = 2000,
        fisher_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if fisher not in ("source", "stream"):
            raise ValueError(f"fisher must be 'source' or 'stream', got {fisher!r}")
        if fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, got {fisher_samples}")
        if fisher_weight < 0:
            raise ValueError(f"fisher_weight must be at least 0, got {fisher_weight}")
        self.source = source
        self.fisher = fisher
        self.fisher_samples = fisher_samples
        self.fisher_weight = fisher_weight
        self._trainer: Trainer | None = None
        #: Of all free parameters, (N,); of none for a run without the penalty, None before a run.
        self._importance: Tensor | None = None

    def configure(self, net: Network) -> None:
        """Free the affines, and measure which of them matter."""
        super().configure(net)
        # In host memory: reading these counts does not wait for the device.
        self._seen = {"batches": torch.zeros((), dtype=torch.int64), "samples": torch.zeros((), dtype=torch.int64)}
        if self._importance is not None:  # the network moved to another device
            self._importance = self._importance.to(net.device)
        elif self.fisher_weight == 0:
            self._importance = torch.empty(0)
        elif self.fisher == "stream":
            self._importance = torch.zeros_like(flatten(net.parameters))
        else:
            self._importance = self._of_source(net)

    def method_state(self) -> dict[str, Tensor]:
        """Return ETA's state and the Fisher information, with the counts that it is the mean of."""
        measured = self._importance
        importance = {"fisher": measured} if measured is not None and len(measured) else {}
        counts = {f"fisher.{name}": value for name, value in self._seen.items()}
        return super().method_state() | importance | (counts if self.fisher == "stream" else {})

    def adapt(self, net: Network, images: Tensor) -> Tensor:
        """Step on the batch, after measuring on it what matters where the stream is to say so."""
        if self.fisher == "stream" and self._penalized():
            self._add_batch(net, images)
        return super().adapt(net, images)

    def pull(self, net: Network) -> tuple[Tensor, Tensor] | None:
        """Pull the weights towards the source, by importance."""
        if not self._penalized():
            return None
        return drift(net.parameters, net.source_vector, self.fisher_weight, self._importance)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable; ``fisher`` is None where it ran as ETA."""
        return super().protocol() | {
            "fisher": None if self._importance is not None and not self._penalized() else self.fisher,
            "fisher_samples": self.fisher_samples,
            "fisher_weight": self.fisher_weight,
        }

    # -- the Fisher information

    def _penalized(self) -> bool:
        return self._importance is not None and len(self._importance) > 0

    def _add_batch(self, net: Network, images: Tensor) -> None:
        batches, samples = self._seen["batches"], self._seen["samples"]
        images = images[: max(0, self.fisher_samples - int(samples))]
        if len(images) == 0:
            return
        with net.with_weights(net.source):
            squares = squared_gradient(net, images)
        batches += 1
        samples += len(images)
        assert self._importance is not None
        self._importance.lerp_(squares, 1 / int(batches))

    def _of_source(self, net: Network) -> Tensor:
        batches = self._source_batches()
        if batches is None:
            warnings.warn(
                "EATA found no source images, so it runs as ETA: nothing keeps the weights near the source. Give "
                "source= (an iterable of image batches), a data module with validation images, or fisher='stream'",
                stacklevel=2,
            )
            return torch.empty(0)
        importance = torch.zeros_like(flatten(net.parameters))
        count = seen = 0
        for batch in batches:
            images = _images_in(batch)[: self.fisher_samples - seen].to(net.device)
            importance += squared_gradient(net, images)
            count += 1
            seen += len(images)
            if seen >= self.fisher_samples:
                break
        if count == 0:
            raise ValueError(
                "source gave no batch of images: give an iterable that can be read again for every run, such as a "
                "list or a DataLoader, or fisher='stream'"
            )
        return importance / count

    def _source_batches(self) -> Iterable[Any] | None:
        if self.source is not None:
            return self.source
        if self._trainer is None or self._engine is None:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self._engine.seed, "source images"))
        return validation_batches(self._trainer, self.fisher_samples, generator)

    # -- a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make gradients possible in the coming evaluation, and remember where source images are."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def _end(self) -> None:
        super()._end()
        self._trainer = self._importance = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a network that is being adapted need no source images any more, which often cannot be copied.
        measured = {} if self._importance is None else {"source": None}
        return {**vars(self), "_trainer": None, **measured}


def squared_gradient(net: Network, images: Tensor) -> Tensor:
    """Return the squared gradient of a batch's mean cross-entropy to its own labels, one vector for all parameters.

    Args:
        net: The network.
        images: (B, 3, H, W).
    """
    logits = net(images).logits
    net.backward(F.cross_entropy(logits, logits.detach().argmax(1)))
    gradient = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters])
    for parameter in net.parameters:
        parameter.grad = None
    return gradient.square()


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
        raise TypeError(
            "source must give batches of images, floats of shape (B, 3, H, W) as the network takes them, or tuples "
            f"that begin with them; got {seen}"
        )
    return images
