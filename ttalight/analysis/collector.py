"""Looks at the features of an adaptation while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ttalight.adapters import Adapter
from ttalight.analysis.features import Features, embed, read_features, source_medians, write_features
from ttalight.analysis.geometry import GeometryRow, geometry, read_geometry, write_geometry
from ttalight.callbacks import Recorder
from ttalight.callbacks.search import find_callback
from ttalight.data import ImageDataModule
from ttalight.data.streams import Stream
from ttalight.engine import Engine
from ttalight.errors import InputError, InputTypeError
from ttalight.tasks import BaseTask, SupervisedTask

__all__ = ["FeatureCollector"]


class FeatureCollector(Callback):
    """Measures features without adaptation and after it, for the images of every domain of an ``adapt`` run.

    After each batch it passes the images, as they are, through the adapted network and through the source's, with the
    statistics that the method predicts with: these are the features behind the predictions after all steps and after
    none. Everything that the method has changed is restored, statistics of normalisation included, nothing
    is drawn, and passes are not counted: the run continues as without the callback. It costs two forwards a batch and,
    with gradients, one copy of the adapted state.

    When a domain is over, its features become the rows of ``geometry.json`` in the run's folder (Davies-Bouldin index,
    distances of class medians) and are dropped, or kept in ``features.npz`` where ``keep`` names the domain. Memory
    holds at most ``images`` of each domain in progress and ``keep_images`` of each that is kept. The labels of the
    stream serve these measures alone. A resumed run keeps the rows of finished domains; of the domain in which
    it was stopped the images from then on are measured (``samples`` says how many).

    Args:
        images: Most images of a domain, the first that arrive.
        source_images: Training images, the first ones, whose class medians target features are compared with, as
            ``source``; 0 for none. Their features are in memory together while the medians are made.
        supervised: Checkpoint of the ``SupervisedTask`` whose classifier an aligned model has: its features of the same
            training images are a second reference, ``supervised``. Needs ``source_images``.
        keep: Names of the domains whose features are kept.
        keep_images: Most images of a kept domain, the first ones.

    Raises:
        ValueError: If an argument is out of range; when the run starts, if ``keep`` names a domain that the stream does
            not have.
        TypeError: When the run starts, if the module is not one of this package's tasks, or no adapter runs.
    """

    def __init__(
        self,
        images: int = 2000,
        source_images: int = 0,
        supervised: str | None = None,
        keep: Sequence[str] = (),
        keep_images: int = 2000,
    ) -> None:
        if images < 1 or keep_images < 1 or source_images < 0:
            raise InputError(
                "images and keep_images must be at least 1 and source_images at least 0, got "
                f"{images}, {keep_images} and {source_images}"
            )
        if supervised is not None and source_images == 0:
            raise InputError("supervised is a reference on training images: say how many by source_images")
        self.images = images
        self.source_images = source_images
        self.supervised = supervised
        self.keep = tuple(keep)
        self.keep_images = keep_images
        #: The rows of the domains that are over.
        self.rows: list[GeometryRow] = []
        #: Features of the domains that are kept.
        self.features: dict[str, Features] = {}
        self._engine: Engine | None = None

    # -- Lightning

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the source's medians, and the rows of a run that is resumed."""
        self._adapter = find_callback(trainer, Adapter)
        self._engine = None if self._adapter is None else self._adapter.engine
        if not isinstance(pl_module, BaseTask) or self._engine is None:
            raise InputTypeError(
                "FeatureCollector reads encoder and projector of this package's tasks while Trainer.adapt runs, got "
                f"{type(pl_module).__name__} and {'no adapter' if self._engine is None else 'an adapter'}"
            )
        data: Any = getattr(trainer, "datamodule", None)
        self._stream: Stream | None = getattr(data, "stream", None)
        recorder = find_callback(trainer, Recorder)
        self._folder = None if recorder is None else recorder.run_folder(trainer)
        self._left = self._images_by_domain()
        unknown = [name for name in self.keep if name not in self._left]
        if unknown:
            raise InputError(f"keep names {', '.join(unknown)}, the stream has {', '.join(self._left)}")
        self._held: dict[str, _Held] = {}
        self.rows, self.features = [], {}
        if getattr(data, "start_batch", 0) and self._folder is not None:
            self._go_on(data.start_batch)
        self._references = self._make_references(pl_module, data)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the features of the batch."""
        assert isinstance(pl_module, BaseTask)
        if self._stream is not None and self._stream.is_probe(batch_idx):
            return
        scored = slice(None) if self._stream is None else self._stream.scored(batch_idx)
        labels = batch[1][scored].cpu()
        names = self._names(batch_idx, len(labels))
        chosen = self._choose(names)
        if chosen.any():
            found = {key: values[scored].cpu() for key, values in self._read(pl_module, batch[0]).items()}
            for name in dict.fromkeys(name for name, wanted in zip(names, chosen.tolist(), strict=True) if wanted):
                own = chosen & torch.tensor([other == name for other in names])
                self._held.setdefault(name, _Held()).add(
                    labels[own], {key: values[own] for key, values in found.items()}
                )
        for name, count in Counter(names).items():
            self._left[name] -= count
            if self._left[name] == 0:
                self._close(trainer, name)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the domains that are not over."""
        for name in list(self._held):
            self._close(trainer, name)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what is not kept."""
        self._engine, self._held, self._references = None, {}, {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop what is not kept; the rows of finished domains are written already."""
        self.on_test_end(trainer, pl_module)

    # -- features

    def _read(self, task: BaseTask, images: Tensor) -> dict[tuple[str, int], Tensor]:
        """Return features without adaptation and after it, (place, steps) -> (B, D)."""
        engine, adapter = self._engine, self._adapter
        assert engine is not None
        assert adapter is not None
        # A method that changes nothing has no steps, whatever it predicts with.
        steps = (getattr(adapter, "steps", 1) or 0) if engine.state is not None and engine.state.live else 0
        found = {(place, steps): values for place, values in self._embed(task, engine, images).items()}
        if steps:
            with engine.at_source():
                found |= {(place, 0): values for place, values in self._embed(task, engine, images).items()}
        return dict(sorted(found.items()))

    def _embed(self, task: BaseTask, engine: Engine, images: Tensor) -> dict[str, Tensor]:
        net = engine.net
        mode = _prediction_mode(self._adapter, net.norms)
        with nullcontext() if mode is None else net.norm_mode(mode), net.precision():
            return embed(task, images)

    def _make_references(self, task: BaseTask, data: Any) -> dict[str, dict[str, Tensor]]:
        if not self.source_images:
            return {}
        if not isinstance(data, ImageDataModule):
            raise InputTypeError(f"source_images needs a data module of this package, got {type(data).__name__}")
        assert self._engine is not None
        with self._engine.at_source(), self._engine.net.as_source():
            references = {"source": source_medians(task, data, self.source_images)}
        if self.supervised is not None:
            shared = {name: task.hparams[name] for name in ("encoder", "num_classes", "stem")}
            teacher = SupervisedTask(weights=self.supervised, image_size=task.crop.size, **shared).to(task.device)
            medians = source_medians(teacher, data, self.source_images)["encoder"]
            references["supervised"] = {"encoder": medians, "projector": medians}
        return references

    # -- domains

    def _images_by_domain(self) -> dict[str, int]:
        """Return the number of images to come of each domain; without a stream there is one that never ends."""
        if self._stream is None:
            return {"all": -1}
        left: dict[str, int] = {}
        for visit, count in zip(self._stream.visits, self._stream.counts().tolist(), strict=True):
            name = self._domain_name(visit.domain)
            left[name] = left.get(name, 0) + (0 if visit.probe else count)
        return left

    def _domain_name(self, index: int) -> str:
        assert self._stream is not None
        domain = self._stream.domains[index]
        several = sum(other.name == domain.name for other in self._stream.domains) > 1
        return f"{domain.name}_{domain.severity}" if several else domain.name

    def _names(self, batch_idx: int, size: int) -> list[str]:
        """Return the domain of each image of a batch that counts."""
        if self._stream is None:
            return ["all"] * size
        visits = self._stream.visit[self._stream.batch(batch_idx)][self._stream.scored(batch_idx)]
        return [self._domain_name(self._stream.visits[visit].domain) for visit in visits.tolist()]

    def _choose(self, names: Sequence[str]) -> Tensor:
        """Return which images of a batch there is room for, (B,)."""
        room = {name: self.images - (len(self._held[name]) if name in self._held else 0) for name in set(names)}
        chosen = torch.zeros(len(names), dtype=torch.bool)
        for index, name in enumerate(names):
            chosen[index] = room[name] > 0
            room[name] -= 1
        return chosen

    def _close(self, trainer: Trainer, name: str) -> None:
        held = self._held.pop(name, None)
        if held is None:
            return
        features = held.features()
        rows = geometry(name, features, self._references)
        self.rows += rows
        if name in self.keep:
            self.features[name] = held.features(self.keep_images)
        for logger in trainer.loggers:
            logger.log_metrics(_scalars(rows), step=len({row["domain"] for row in self.rows}))
        if self._folder is not None and trainer.is_global_zero:
            if name in self.keep:
                write_features(self._folder, self.features)
            write_geometry(self._folder, self.rows)

    def _go_on(self, batches: int) -> None:
        """Read what an earlier process has written of the domains that were over then."""
        assert self._stream is not None
        assert self._folder is not None
        for batch in range(batches):
            if not self._stream.is_probe(batch):
                stop = self._stream.scored(batch)
                for name, count in Counter(self._names(batch, stop.stop - (stop.start or 0))).items():
                    self._left[name] -= count
        over = [name for name, left in self._left.items() if left == 0]
        try:
            self.rows = [row for row in read_geometry(self._folder) if row["domain"] in over]
            kept = read_features(self._folder) if any(name in over for name in self.keep) else {}
        except FileNotFoundError:  # the collector joins a run that was begun without
            return
        self.features = {name: features for name, features in kept.items() if name in over and name in self.keep}


class _Held:
    """Features of a domain that is not over."""

    def __init__(self) -> None:
        self.labels: list[Tensor] = []
        self.values: dict[tuple[str, int], list[Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.labels))

    def add(self, labels: Tensor, values: dict[tuple[str, int], Tensor]) -> None:
        self.labels.append(labels)
        for key, value in values.items():
            self.values.setdefault(key, []).append(value)

    def features(self, most: int | None = None) -> Features:
        values = {key: torch.cat(parts)[:most].clone() for key, parts in self.values.items()}
        return Features(torch.cat(self.labels)[:most], values)


def _prediction_mode(adapter: Adapter | None, norms: Sequence[Any]) -> Literal["source", "batch"] | None:
    """Return the mode of the normalisation layers that a method predicts with; None for the one that they have."""
    norm = getattr(adapter, "norm", None)
    if norm == "batch":
        return "batch"
    return "source" if norm in ("ema", "source") or any(layer.mode == "ema" for layer in norms) else None


def _scalars(rows: Sequence[GeometryRow]) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in rows:
        where = f"{row['place']}_{row['steps']}"
        if row["davies_bouldin"] is not None:
            values[f"davies_bouldin/{where}"] = row["davies_bouldin"]
        values |= {f"distance_to_{name}/{where}": found["mean"] for name, found in row["distances"].items()}
    return values
