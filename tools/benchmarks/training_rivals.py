"""Rivals in the bench of training: bare steps of the network, and the usual pipeline."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import torch
from lightning import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision import transforms

from ttalight.data import ImageDataModule
from ttalight.losses import alignment_loss, contrastive_loss

STAGES = ("supervised", "simclr", "alignment")
SIDE, CLASSES, RATE = 32, 10, 1e-3
#: Makes one step or several; returns what other processes took for it, in seconds, where that counts.
Step = Callable[[], float]


class Setting(NamedTuple):
    """Measurements of one row of the table."""

    stage: str
    network: str
    batch: int
    precision: str
    channels_last: str
    compile: str
    rounds: int
    turn: int
    workers: int
    threads: int
    images: int
    root: str | None
    device: str


class Bare:
    """Steps of encoder and head in plain torch."""

    def __init__(self, setting: Setting, task: LightningModule) -> None:
        self.setting = setting
        head = task.classifier if setting.stage == "supervised" else task.projector
        self.network = copy.deepcopy(nn.Sequential(task.encoder, head)).train().to(setting.device)
        if setting.channels_last == "yes":
            self.network.to(memory_format=torch.channels_last)
        count = setting.batch if setting.stage == "supervised" else 2 * setting.batch
        self.images = self.arranged(torch.randn(count, 3, SIDE, SIDE))
        self.labels = torch.randint(CLASSES, (count,), device=setting.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=RATE, foreach=True)

    def arranged(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.setting.channels_last == "yes" else torch.contiguous_format
        return images.to(self.setting.device).contiguous(memory_format=layout)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bf16-mixed")

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def __call__(self) -> float:
        with self.autocast():
            loss = cross_entropy(self.network(self.images), self.labels)
        self.step(loss)
        return 0.0


class UsualTransform:
    """The results of a picture: one training image, two views, or these and the clean image."""

    def __init__(self, stage: str, data: ImageDataModule) -> None:
        flip, end = (
            transforms.RandomHorizontalFlip(),
            [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)],
        )
        crop = [transforms.RandomCrop(SIDE, padding=4), flip]
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        view = [transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0)), flip, jitter, transforms.RandomGrayscale(0.2)]
        steps = {"supervised": [crop], "simclr": [view, view], "alignment": [view, view, []]}
        self.pipelines = [transforms.Compose([*some, *end]) for some in steps[stage]]

    def __call__(self, picture: Image.Image) -> list[Tensor]:
        return [pipeline(picture) for pipeline in self.pipelines]


class Pictures(Dataset[Any]):
    """Pictures of an array as torchvision's CIFAR10 delivers them, each transformed by itself; says what a batch took.

    A batch is images (as many as there are views), labels and CPU seconds.
    """

    def __init__(self, data: ImageDataModule, transform: UsualTransform) -> None:
        self.pixels = data.train_set.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train_set.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[list[Tensor], Tensor, float]:
        start = time.process_time()
        pictures = [(self.transform(Image.fromarray(self.pixels[index])), self.labels[index]) for index in indices]
        images, labels = default_collate(pictures)
        return images, labels, time.process_time() - start


class Usual(Bare):
    """Some batches from workers that transform one picture after another, and a plain loop over them."""

    def __init__(self, setting: Setting, task: LightningModule, data: ImageDataModule) -> None:
        super().__init__(setting, task)
        pictures = Pictures(data, UsualTransform(setting.stage, data))
        workers: dict[str, Any] = {"num_workers": setting.workers}
        if setting.workers:
            workers |= {"persistent_workers": True, "multiprocessing_context": "fork"}
        self.loader: DataLoader[Any] = DataLoader(
            pictures,
            setting.batch,
            sampler=RandomSampler(pictures, num_samples=setting.batch * setting.turn),
            collate_fn=lambda batch: batch,
            pin_memory=setting.device != "cpu",
            **workers,
        )
        if setting.stage == "alignment":
            self.teacher = copy.deepcopy(task.teacher["encoder"]).eval().to(setting.device)

    def loss(self, parts: list[Tensor], labels: Tensor) -> Tensor:
        if self.setting.stage == "supervised":
            return cross_entropy(self.network(parts[0]), labels)
        first, second = self.network(self.arranged(torch.cat(parts[:2]))).chunk(2)
        if self.setting.stage == "simclr":
            return contrastive_loss(first, second, 0.1)
        with torch.no_grad():
            target = self.teacher(parts[2])
        return alignment_loss(first, second, target, 0.5)

    def __call__(self) -> float:
        elsewhere = 0.0
        for parts, labels, taken in self.loader:
            with self.autocast():
                loss = self.loss([self.arranged(part) for part in parts], labels.to(self.setting.device))
            self.step(loss)
            elsewhere += taken
        apart = self.setting.workers and self.setting.device == "cpu" and self.setting.threads == 1
        return elsewhere if apart else 0.0
