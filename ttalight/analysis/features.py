"""Features of encoder and projector, as a task hands them to its classifier and to its self-supervised loss."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ttalight.analysis.clusters import class_medians
from ttalight.data import ImageDataModule
from ttalight.data.image_files import as_is
from ttalight.errors import InputError, MissingFileError
from ttalight.files.atomic import write_files
from ttalight.files.untrusted import DAMAGE, check_archive, read_member
from ttalight.tasks import BaseTask
from ttalight.tasks.two_view import TwoViewTask

__all__ = ["Features", "embed", "read_features", "source_medians", "stratified", "write_features"]

_FILE = "features.npz"


@dataclass(frozen=True)
class Features:
    """Features of the images of one domain.

    Args:
        labels: Classes, (N,).
        values: (place, steps of adaptation) -> (N, D); places are ``encoder`` and ``projector``.
    """

    labels: Tensor
    values: Mapping[tuple[str, int], Tensor]


def embed(task: BaseTask, images: Tensor) -> dict[str, Tensor]:
    """Return the features of images by place: ``encoder``, and ``projector`` where a task has one behind it.

    Args:
        task: The task, in eval mode.
        images: (B, 3, H, W) in [0, 1].

    Returns:
        Place -> (B, D), float32 without a graph.
    """
    with torch.no_grad():
        encoded = task.encode(images)
        places = {"encoder": encoded}
        if isinstance(task, TwoViewTask):
            places["projector"] = task.projector(encoded)
    return {place: values.float() for place, values in places.items()}


def source_medians(task: BaseTask, data: ImageDataModule, images: int) -> dict[str, Tensor]:
    """Return the class medians of the features of training images, as they are; nothing random is drawn.

    Args:
        task: The task with source weights.
        data: Has the training images.
        images: Number of training images, the first ones; their features are in memory at the same time.

    Returns:
        Place -> (C, D) on the CPU.

    Raises:
        ValueError: If ``images`` is not positive.
    """
    if images < 1:
        raise InputError(f"medians need at least one image, got images={images}")
    train_set = data.open("train")
    chosen = range(min(images, len(train_set)))
    # A generator of its own: a loader draws a seed for its workers from the global one.
    loader = DataLoader(train_set, data.batch_size, sampler=chosen, collate_fn=as_is, generator=torch.Generator())
    training = task.training
    task.eval()
    seen: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    try:
        for batch in loader:
            pixels = data.on_after_batch_transfer((batch[0].to(task.device),), 0)[0]
            for place, values in embed(task, pixels).items():
                seen.setdefault(place, []).append(values.cpu())
            labels.append(batch[1].cpu())
    finally:
        task.train(training)
    classes = torch.cat(labels)
    return {place: class_medians(torch.cat(parts), classes, data.num_classes) for place, parts in seen.items()}


def stratified(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return indices of ``count`` samples, all if there are fewer, with the classes as even as they can be.

    Args:
        labels: Classes, (N,).
        count: Number of samples.
        seed: Seed of the choice.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.zeros(len(labels), dtype=torch.long)
    for label in torch.unique(labels).tolist():
        own = order[labels[order] == label]
        rank[own] = torch.arange(len(own))
    chosen = order[rank[order].argsort(stable=True)][:count]
    return chosen.sort().values


def write_features(folder: str | Path, features: Mapping[str, Features]) -> None:
    """Write ``features.npz``, with plain arrays ``<domain>.labels`` and ``<domain>.<place>.<steps>``.

    Args:
        folder: The run's folder.
        features: Domain -> its features.

    Raises:
        OSError: If the folder is not writable.
    """
    arrays: dict[str, Any] = {}
    for domain, own in features.items():
        arrays[f"{domain}.labels"] = own.labels.numpy()
        arrays |= {f"{domain}.{place}.{steps}": value.numpy() for (place, steps), value in own.values.items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_files(folder, {_FILE: content.getvalue()})


def read_features(folder: str | Path) -> dict[str, Features]:
    """Read what ``write_features`` wrote; nothing in the file can run code.

    Args:
        folder: The run's folder.

    Returns:
        Domain -> its features.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise MissingFileError(
            f"no {path}: features are kept by a run with a FeatureCollector whose keep names their domains"
        )
    labels: dict[str, Tensor] = {}
    values: dict[str, dict[tuple[str, int], Tensor]] = {}
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                domain, place, *steps = name.rsplit(".", 1 if name.endswith(".labels") else 2)
                array = torch.from_numpy(read_member(archive, name, "f" if steps else "iu"))
                if steps:
                    values.setdefault(domain, {})[place, int(steps[0])] = array
                else:
                    labels[domain] = array
        return {domain: Features(own, values[domain]) for domain, own in labels.items()}
    except DAMAGE as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): repeat the run") from error
