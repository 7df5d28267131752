"""Saved embeddings as data: a stream of features in place of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from ttalight.data.arrays import ImageArrays
from ttalight.data.module import ImageDataModule, Split
from ttalight.data.splits import held_out
from ttalight.data.streams import Domain, StreamOrder
from ttalight.errors import InputError
from ttalight.files.embeddings import Embeddings, read_embeddings, write_embeddings

__all__ = ["EmbeddingsDataModule", "save_embeddings"]


class EmbeddingsDataModule(ImageDataModule):
    """Features of images that were saved once, (B, D) in a batch, in the place of images.

    With ``EmbeddingTask`` methods that read features run on them without images and without a network. All streams
    work as on images. ``fit`` trains on the samples of the file.

    Args:
        file: A file of ``save_embeddings``, or of ``torch.save`` with a dict of ``image_features`` (N, D) and
            ``labels`` (N,), and at will of ``domain`` (N,), ``domains`` (a list of name and severity, 0 for none),
            ``text_features`` (C, D) and ``names``.
        domains: Names of the stream's domains; by default all of the file.
        batch_size: Samples in a batch, of training and of the stream.
        stream: Order in which the domains' samples arrive; ``PerDomain()`` by default.
        limit: Use only the first so many samples of every domain.
        seed: Seed of the stream.
        validation: Number of samples that ``fit`` keeps for validation.

    Raises:
        ValueError: If an argument is out of range, or the file is damaged or holds something else.
        FileNotFoundError: If there is no such file.
    """

    def __init__(
        self,
        file: str,
        domains: Sequence[str] | None = None,
        batch_size: int = 256,
        stream: StreamOrder | None = None,
        limit: int | None = None,
        seed: int = 0,
        validation: int = 0,
    ) -> None:
        self.file = file
        self.embeddings = read_embeddings(Path(file).expanduser())
        names = list(dict.fromkeys(name for name, _ in self.embeddings.domains))
        if unknown := [name for name in domains or () if name not in names]:
            raise InputError(f"{file} has no domain {', '.join(unknown)}: it has {', '.join(names)}")
        wanted = names if domains is None else domains
        super().__init__(batch_size=batch_size, domains=wanted, stream=stream, limit=limit, seed=seed)
        if validation < 0:
            raise InputError(f"validation must be at least 0, got {validation}")
        self.validation, self.has_validation = validation, validation > 0
        texts, labels = self.embeddings.text_features, self.embeddings.labels
        self.num_classes = len(texts) if isinstance(texts, Tensor) else int(labels.max()) + 1

    def protocol(self) -> dict[str, Any]:
        """Return the hash of the file, which is saved with a result, so that results can be compared."""
        return {"embeddings": self.embeddings.sha256}

    def load(self, split: Split) -> ImageArrays:
        """Return the samples of a split."""
        labels = self.embeddings.labels
        chosen = torch.arange(len(labels))
        if split != "test" and self.has_validation:
            chosen = torch.from_numpy(held_out(labels.numpy(), self.validation, split))
        return _FeatureArrays(self.embeddings.features[chosen], labels[chosen])

    def stream_domains(self) -> list[tuple[str, int]]:
        """Return name and severity of each domain that the stream is made of; see ``ImageDataModule``.

        Raises:
            ValueError: If the file lacks one that the stream asks for.
        """
        known = self.embeddings.domains
        wanted: list[tuple[str, int]] = []
        for name in self.domains:
            levels = [level for other, level in known if other == name]
            wanted += [(name, level) for level in (self.order.severities(max(levels)) if any(levels) else levels)]
        wanted += [("clean", 0)] if self.order.needs_clean else []
        if missing := [f"{name} at {level}" if level else name for name, level in wanted if (name, level) not in known]:
            raise InputError(f"{type(self.order).__name__} asks for {', '.join(missing)}, which {self.file} has not")
        return wanted

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order, with their features."""
        return [(Domain(*key), self._part(self.embeddings.domains.index(key))) for key in self.stream_domains()]

    def _part(self, number: int) -> ImageArrays:
        chosen = (self.embeddings.domain == number).nonzero()[: self.limit, 0]
        return _FeatureArrays(self.embeddings.features[chosen], self.embeddings.labels[chosen])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the features of a batch into the trainer's precision."""
        features, *rest = batch
        if self.trainer is not None:
            features = self.trainer.precision_plugin.convert_input(features)
        return (features, *rest)


class _FeatureArrays(ImageArrays):
    """Features (N, D) in the place of images."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.with_index = features, labels, False


@torch.no_grad()
def save_embeddings(task: LightningModule, data: ImageDataModule, path: str | Path, split: Split | None = None) -> None:
    """Save what a vision-language model makes of the images of a data module, and its text features.

    ``EmbeddingsDataModule`` and ``EmbeddingTask`` read the file.

    Args:
        task: A ``VisionLanguageTask``, on the device that it shall run on.
        data: The data module; ``domains``, ``limit`` and ``batch_size`` say which images, and how many at once.
        path: The file. One of that name is replaced.
        split: ``train``, ``validation`` or ``test`` for the clean images of that split, in place of the domains.
    """
    model: Any = task.eval()
    domains, features, labels, numbers = [], [], [], []
    sets = data.load_domains() if split is None else [(Domain("clean"), data.load(split))]
    for number, (domain, arrays) in enumerate(sets):
        domains.append((domain.name, domain.severity))
        for start in range(0, len(arrays), data.batch_size):
            images, known = arrays.__getitems__(range(start, min(start + data.batch_size, len(arrays))))[:2]
            images = data.on_after_batch_transfer((images.to(task.device),), 0)[0]
            features.append(model.encode_image(images).cpu())
            labels.append(known)
            numbers.append(torch.full_like(known, number))
    texts = model.classifier.weight.detach().cpu()
    saved = Embeddings(
        torch.cat(features), torch.cat(labels), torch.cat(numbers), domains, texts, getattr(task, "class_names", None)
    )
    write_embeddings(Path(path), saved)
