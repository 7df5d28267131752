"""SegmentationTask: training, logits at the images' size, weights, and adaptation of batches of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ttalight import Trainer
from ttalight.adapters import Tent
from ttalight.data import Continual, SegmentationDataModule
from ttalight.tasks import SegmentationTask


class Small(nn.Module):
    """Logits at half the resolution, in a dict; an attribute hides ``nn.Module.modules``."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, classes, 1)
        self.modules = [self.body, self.head]

    def forward(self, images):
        return {"out": self.head(self.body(images)), "aux": images}


@pytest.fixture
def folder(tmp_path):
    """Images whose left third is red, right third is blue; the class of a pixel is its colour, with a void row."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        for index in range(count):
            labels = np.zeros((16, 24), np.uint8)
            labels[:, 8:16], labels[:, 16:] = 1, 2
            labels = np.roll(labels, draws.integers(24), 1)
            image = np.eye(3)[labels] * 200 + draws.integers(0, 40, (16, 24, 3))
            labels[0] = 9
            for kind, pixels in (("images", image.astype(np.uint8)), ("labels", labels)):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / kind / split / f"{index}.png")
    return tmp_path


def make_data(folder, **arguments):
    given = {"batch_size": 4, "class_map": {0: 0, 1: 1, 2: 2}} | arguments
    return SegmentationDataModule(3, root=str(folder), num_workers=0, **given)


def make_task(**arguments):
    torch.manual_seed(0)
    return SegmentationTask(Small(), 3, lr=0.05, warmup_epochs=0, **arguments)


def trainer(folder, **arguments):
    return Trainer(
        default_root_dir=str(folder), accelerator="cpu", enable_progress_bar=False, logger=False, **arguments
    )


def test_training_and_weights(folder):
    task, run = make_task(), trainer(folder / "fit", max_epochs=15)
    run.fit(task, make_data(folder))
    assert run.callback_metrics["val/accuracy"] > 0.9
    results = trainer(folder / "run").adapt(task, make_data(folder, stream=Continual(rounds=2)), Tent())
    assert [row["samples"] for row in results["domains"]] == [4, 4]
    assert results["mean"]["miou"] > 0.8
    assert len(results["domains"][0]["iou"]) == 3
    loaded = make_task(weights=str(folder / "fit/checkpoints/last.ckpt"))
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), task.parameters(), strict=True))
    torch.save(task.network.state_dict(), folder / "network.pth")
    assert torch.equal(make_task(weights=str(folder / "network.pth")).network.head.weight, task.network.head.weight)


def test_void_pixels_do_not_count():
    task = make_task()
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    expected = torch.nn.functional.cross_entropy(logits[:, :, 1:], labels[:, 1:])
    labels[:, 0] = 255
    torch.testing.assert_close(task.loss(logits, labels), expected)
    assert task.loss(logits, torch.full_like(labels, 255)) == 0


def test_sizes_may_change_from_batch_to_batch(folder):
    Image.open(folder / "images/test/0.png").resize((32, 18)).save(folder / "images/test/0.png")
    Image.open(folder / "labels/test/0.png").resize((32, 18), 0).save(folder / "labels/test/0.png")
    results = trainer(folder / "run").adapt(make_task(), make_data(folder, batch_size=1), Tent())
    assert results["complete"]
    assert results["cost"]["backwards_per_batch"] == 1


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "resnet18"])
def test_networks_by_name(name):
    task = SegmentationTask(name, 5).eval()
    with torch.no_grad():
        assert task(torch.rand(1, 3, 40, 56)).shape == (1, 5, 40, 56)


def test_errors(folder):
    with pytest.raises(ValueError, match="labels must be from 0 to 2, got 0 to 9"):
        trainer(folder / "fit", max_epochs=1).fit(make_task(), make_data(folder, class_map=None))
    with pytest.raises(ValueError, match="no maps of its stages, or timm does not know it"):
        SegmentationTask("no_such_network")
    task = SegmentationTask(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 3)
    with pytest.raises(ValueError, match=r"logits of shape \(1, 3\), expected one class a pixel"):
        task(torch.rand(1, 3, 2, 2))
