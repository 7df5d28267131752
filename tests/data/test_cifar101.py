"""CIFAR-10.1: the new test set in the place of the old one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.data import CIFARDataModule, CorruptedDataModule
from ttalight.data.corruptions import corrupt


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "CIFAR-10.1"
    folder.mkdir()
    for seed, version in enumerate(("v4", "v6")):
        pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"cifar10.1_{version}_data.npy", pixels)
        np.save(folder / f"cifar10.1_{version}_labels.npy", (np.arange(20 + seed) % 10).astype(np.int32))
    return folder


@pytest.mark.parametrize(("dataset", "seed"), [("cifar10.1_v4", 0), ("cifar10.1", 1)])
def test_is_read_as_published(folder, dataset, seed):
    data = CIFARDataModule(dataset=dataset, root=str(folder.parent))
    images = data.load("test")
    expected = np.random.default_rng(seed).integers(0, 256, (20 + seed, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(images.images.permute(0, 2, 3, 1).numpy(), expected)
    assert images.labels.tolist() == [index % 10 for index in range(20 + seed)]
    assert (data.num_classes, data.mean) == (10, CIFARDataModule().mean)


def test_repository_with_its_folder(folder):
    moved = folder / "datasets"
    moved.mkdir()
    for path in folder.glob("*.npy"):
        path.rename(moved / path.name)
    assert len(CIFARDataModule(dataset="cifar10.1", root=str(folder.parent)).load("test")) == 21


def test_corruptions_on_the_fly(folder):
    data = CIFARDataModule(dataset="cifar10.1", root=str(folder.parent), domains=["clean", "fog"], severity=3)
    data.setup("test")
    clean, fog = data._stream_set.domains
    assert torch.equal(fog.images, corrupt(clean.images, "fog", 3))


def test_missing_and_damaged(folder):
    def load():
        CIFARDataModule(dataset="cifar10.1", root=str(folder.parent)).load("test")

    np.save(folder / "cifar10.1_v6_labels.npy", np.arange(21))
    with pytest.raises(ValueError, match="labels from 0 to 20, expected 0 to 9"):
        load()
    (folder / "cifar10.1_v6_labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"no cifar10.1_v6_labels.npy in .*modestyachts/CIFAR-10.1"):
        load()


def test_unknown_set():
    with pytest.raises(ValueError, match=r"one of cifar10, cifar100, cifar10\.1, cifar10\.1_v4, got 'c'"):
        CIFARDataModule(dataset="c")
    with pytest.raises(ValueError, match=r"corrupted images are published of cifar10 and cifar100, not of cifar10\.1"):
        CorruptedDataModule(dataset="cifar10.1")
