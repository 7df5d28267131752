"""The weights that travel inside the package."""

from __future__ import annotations

import pytest
import torch

from ttalight.data import DigitsDataModule
from ttalight.tasks import CrossTaskTTT

NETWORK = {"encoder": "cifar_resnet8"}


def test_network_from_mnist_knows_other_digits():
    task = CrossTaskTTT(aligned="ttalight:mnist.ckpt", **NETWORK).eval()
    test = DigitsDataModule().load("test")
    with torch.no_grad():
        right = task(test.images / 255).argmax(1) == test.labels
    assert 0.8 < right.double().mean() < 0.9  # another scanner: 98 % on MNIST
    assert task.source["file"] == "ttalight:mnist.ckpt"
    assert len(task.source["sha256"]) == 64


def test_name_that_is_not_in_the_package():
    with pytest.raises(FileNotFoundError, match=r"aligned: there is no file ttalight:other\.ckpt"):
        CrossTaskTTT(aligned="ttalight:other.ckpt", **NETWORK)
