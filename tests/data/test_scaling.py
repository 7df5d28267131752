"""Scaling of image files: by the argument, else as pretrained weights expect, and exactly as torchvision does."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from ttalight import Trainer
from ttalight.adapters import Source
from ttalight.data import ImageFolderDataModule, Mixed, TinyImageNetDataModule
from ttalight.data.image_files import FileDomain, read_image
from ttalight.models import Preprocessing
from ttalight.tasks import SupervisedTask


@pytest.fixture
def root(tmp_path):
    for index in range(6):
        path = tmp_path / "test" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize(("scale", "size"), [(40, 31), (64, 64), (33, 32)])
def test_is_torchvision_s_resize_and_center_crop(root, filter, scale, size):
    path = root / "test" / "class0" / "0.png"
    with Image.open(path) as image:
        expected = Compose([Resize(scale, InterpolationMode(filter)), CenterCrop(size), PILToTensor()])(image)
    assert torch.equal(read_image(path, size, scale, filter), expected)


class Model:
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, 36, 40, "bicubic")


class FakeTrainer:
    lightning_module = Model()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (40, "bicubic")),
        ({"resize": 48}, (48, "bicubic")),
        ({"interpolation": "bilinear"}, (40, "bilinear")),
        ({"resize": 48, "interpolation": "lanczos"}, (48, "lanczos")),
    ],
)
def test_pretrained_weights_fill_open_arguments(root, arguments, expected):
    data = ImageFolderDataModule(root=str(root), num_workers=0, batch_size=6, **arguments)
    assert (data.resize, data.interpolation) == (
        arguments.get("resize", 256),
        arguments.get("interpolation", "bilinear"),
    )
    data.trainer = FakeTrainer()
    data.setup("test")
    assert data.protocol() == dict(zip(("resize", "interpolation"), expected, strict=True))
    assert data.corruption_table == ("tiny_imagenet" if expected[0] >= 48 else "cifar")
    images, _ = next(iter(data.test_dataloader()))
    shown = {image.numpy().tobytes() for image in images}
    path = root / "test" / "class1" / "3.png"
    assert read_image(path, expected[0], interpolation=expected[1]).numpy().tobytes() in shown


def test_through_a_run(root, tmp_path, caplog):
    import timm

    torch.save(timm.create_model("test_efficientnet", num_classes=2).state_dict(), tmp_path / "net.pth")
    task = SupervisedTask(
        encoder="test_efficientnet", stem="imagenet", num_classes=2, weights=str(tmp_path / "net.pth")
    )
    wanted = task.preprocessing
    data = ImageFolderDataModule(root=str(root), num_workers=0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with caplog.at_level(logging.INFO):
        Trainer(**options).adapt(task, data, Source())
    assert (data.resize, data.interpolation) == (wanted.resize, wanted.interpolation)
    assert f"size {wanted.resize} {wanted.interpolation}, crop {wanted.size} (from the model's" in caplog.text


def test_tiny_imagenet_stays_at_its_size():
    data = TinyImageNetDataModule()
    data.trainer = FakeTrainer()
    data._take_preprocessing()
    assert (data.resize, data.interpolation) == (64, "bicubic")


@pytest.mark.parametrize("arguments", [{"interpolation": "cubic"}, {"interpolation": "random"}])
def test_unknown_filters(arguments):
    with pytest.raises(ValueError, match=r"interpolation must be one of nearest, .*bicubic, .*lanczos, got '"):
        ImageFolderDataModule(**arguments)


def test_a_domain_of_files_keeps_no_images(root):
    data = ImageFolderDataModule(root=str(root), num_workers=0, resize=32)
    files = data.open("test")
    domain = FileDomain(files, limit=5)
    assert domain.images.shape == (5, 3, 32, 32)
    assert domain.images.untyped_storage().nbytes() == 1
    images, labels = domain.__getitems__([4, 0])
    assert torch.equal(images[0], read_image(files.path(4), 32))
    assert torch.equal(labels, files.labels[[4, 0]])
    part = files.part(np.array([5, 1]))
    assert [part.path(0), part.path(1)] == [files.path(5), files.path(1)]
    assert len(files) == 6


def test_domains_of_files_mix_with_others(root):
    class Both(ImageFolderDataModule):
        def load_domains(self):
            (clean,) = super().load_domains()
            return [clean, (self.domain("clean"), FileDomain(self.open("test")))]

    data = Both(root=str(root), num_workers=0, resize=32, batch_size=12, stream=Mixed())
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    assert len(images) == 12
    keys = sorted((image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    assert keys[::2] == keys[1::2]  # every image twice, from memory and from its file
