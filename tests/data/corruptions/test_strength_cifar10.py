"""Strength of the corruptions on CIFAR-10, and for a public network."""

from __future__ import annotations

import hashlib
import pickle
import tarfile

import pytest
import timm
import torch

import ttalight.models  # noqa: F401  (registers cifar_resnet20 with timm)
from ttalight.data.corruptions import COMMON, corrupt

# Distance to the clean image (root mean square, grey levels): severities 1 to 5 as the authors' code gives it (whole
# levels, 300 images, not these), and severity 5 on all images.
AUTHORS = {
    "gaussian_noise": (10, 15, 20, 22, 25),
    "shot_noise": (8, 11, 17, 20, 24),
    "impulse_noise": (14, 20, 25, 31, 38),
    "glass_blur": (22, 22, 20, 31, 29),
    "motion_blur": (12, 16, 20, 20, 23),
    "snow": (14, 27, 31, 43, 56),
    "frost": (32, 48, 55, 49, 51),
    "fog": (12, 25, 33, 38, 46),
    "elastic_transform": (35, 32, 29, 27, 22),
    "speckle_noise": (8, 13, 16, 20, 25),
}
WHOLE = (24.6, 23.7, 37.8, 14.3, 29.9, 23.8, 26.0, 56.3, 50.0, 48.0, 60.1, 45.6, 22.9, 14.5, 11.1)

# Accuracy in percent of the public ResNet-20 on all images at severity 5, in the order of COMMON.
ACCURACY = (24.0, 29.9, 22.3, 58.5, 42.4, 60.0, 59.2, 69.3, 52.8, 66.0, 86.9, 26.6, 70.3, 39.3, 70.3)


def distance(a, b):
    """Root of the mean squared difference of grey levels."""
    return (a.float() - b.float()).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def cifar(shared_data):
    with tarfile.open(shared_data / "cifar-10-test.tar.xz") as archive:
        content = archive.extractfile("cifar-10-batches-py/test_batch").read()
    assert hashlib.md5(content).hexdigest() == "40351d587109b95175f43aff81a1287e"
    batch = pickle.loads(content, encoding="latin1")
    return torch.from_numpy(batch["data"]).view(-1, 3, 32, 32), torch.tensor(batch["labels"])


@pytest.mark.data
@pytest.mark.parametrize("corruption", AUTHORS)
def test_strength_is_the_authors_at_every_severity(corruption, cifar):
    images = cifar[0][:500]
    for severity, strength in enumerate(AUTHORS[corruption], start=1):
        assert distance(corrupt(images, corruption, severity), images) == pytest.approx(strength, rel=0.12, abs=0.6)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("corruption", "strength"), list(zip(COMMON, WHOLE, strict=True)))
def test_strength_on_the_whole_test_set(corruption, strength, cifar):
    images = cifar[0]
    tolerance = 0.06 if corruption == "frost" else 0.03
    assert distance(corrupt(images, corruption, 5), images) == pytest.approx(strength, rel=tolerance)


@pytest.mark.data
@pytest.mark.slow
def test_a_public_network_errs_as_often_as_it_should(cifar, shared_data):
    state = torch.load(shared_data / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)["state_dict"]
    network = timm.create_model("cifar_resnet20", num_classes=10).eval()
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images, labels = cifar[0][:200], cifar[1][:200]
    accuracy = []
    with torch.inference_mode():
        for corruption in COMMON:
            corrupted = corrupt(images, corruption, 5)
            right = network((corrupted / 255 - mean) / std).argmax(1) == labels
            accuracy.append(100 * right.float().mean().item())
    # 200 of 10,000 images: one standard deviation is at most 3.5 points each.
    assert accuracy == pytest.approx(ACCURACY, abs=11)
    assert sum(accuracy) / 15 == pytest.approx(sum(ACCURACY) / 15, abs=2.5)
