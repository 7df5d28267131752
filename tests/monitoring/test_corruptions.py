"""A watch on corrupted CIFAR-10 with a public network: what works is left alone."""

from __future__ import annotations

import pickle
import tarfile

import pytest
import torch

from ttalight.adapters import ETA, Tent
from ttalight.data.corruptions import corrupt
from ttalight.monitoring import Watch
from ttalight.tasks import SupervisedTask

#: Of noise, weather and what cameras do.
CORRUPTIONS = ("gaussian_noise", "fog", "contrast")

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def stream(shared_data):
    with tarfile.open(shared_data / "cifar-10-test.tar.xz") as archive:
        read = pickle.load(archive.extractfile("cifar-10-batches-py/test_batch"), encoding="latin1")
    images = torch.from_numpy(read["data"][:100]).view(-1, 3, 32, 32)
    return [corrupt(images, name, 5).float() / 255 for name in CORRUPTIONS]


@pytest.fixture
def network(shared_data):
    return SupervisedTask(
        encoder="cifar_resnet20", num_classes=10, stem="cifar", weights=str(shared_data / "resnet20-12fca82f.th"),
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    ).eval()  # fmt: skip


@pytest.mark.parametrize("method", [Tent, ETA])
def test_published_settings_never_trip(method, network, stream):
    watch = Watch()
    adapted = method(reset="never").wrap(network).watch(watch)
    for images in stream:
        adapted(images)
    assert watch.trips == []
    assert watch.signals["step"] > 0


def test_absurd_rate_trips_within_three_batches(network, stream):
    watch = Watch()
    adapted = Tent(lr=1.0, reset="never").wrap(network).watch(watch)
    for images in stream[:3]:
        adapted(images)
    assert watch.trips
