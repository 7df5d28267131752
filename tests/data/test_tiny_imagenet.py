"""Tiny ImageNet and its corrupted copies, as small twins of the published folders."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ttalight.data import PerDomain, TinyImageNetDataModule
from ttalight.data.corruptions import corrupt

WNIDS = ("n03", "n01", "n02")


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, format="PNG")  # the name says JPEG; exact pixels are easier to compare


@pytest.fixture
def root(tmp_path):
    tree = tmp_path / "tiny-imagenet-200"
    lines = []
    for number, wnid in enumerate(WNIDS):
        for index in range(6):
            paint(tree / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", 100 * number + index)
        for index in range(2):
            paint(tree / "val" / "images" / f"val_{number}_{index}.JPEG", 1000 * (number + 1) + index)
            lines.append(f"val_{number}_{index}.JPEG\t{wnid}\t0\t0\t44\t62")
        paint(tmp_path / "Tiny-ImageNet-C" / "fog" / "3" / wnid / "test_0.JPEG", 7 + number)
    (tree / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (tree / "wnids.txt").write_text("\n".join(WNIDS))
    return tmp_path


@pytest.fixture
def make(root):
    def build(**arguments):
        defaults = {"root": str(root), "num_workers": 0, "batch_size": 4, "validation": 3}
        return TinyImageNetDataModule(**(defaults | arguments))

    return build


def shown(data):
    data.setup("test")
    images, labels = zip(*data.test_dataloader(), strict=True)
    return torch.cat(images), torch.cat(labels)


def label_of(image):
    """The label that a test image must have, by the number that it was painted with."""
    for number, wnid in enumerate(WNIDS):
        for index in range(2):
            if np.array_equal(image.permute(1, 2, 0).numpy(), pixels(1000 * (number + 1) + index)):
                return sorted(WNIDS).index(wnid)
    raise AssertionError("not a test image")


def test_test_labels_come_from_annotations(make):
    images, labels = shown(make())
    assert images.shape == (6, 3, 64, 64)
    assert labels.tolist() == [label_of(image) for image in images]


def test_sorted_test_images_are_the_same(make, root):
    images, labels = shown(make(stream=PerDomain(shuffle=False)))
    val = root / "tiny-imagenet-200" / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (val / wnid / "images").mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(val / wnid / "images" / name)
    (val / "val_annotations.txt").unlink()
    shutil.rmtree(val / "images")
    again, same = shown(make(stream=PerDomain(shuffle=False)))
    assert {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)} == {
        image.numpy().tobytes(): int(label) for image, label in zip(again, same, strict=True)
    }


def test_validation_is_part_of_training_images(make):
    data = make()
    data.setup("fit")
    train, validation = data.train_set, data.validation_set
    assert (len(train), len(validation), data.num_classes) == (15, 3, 3)
    assert validation.labels.tolist().count(0) == 1  # classes spread evenly
    paths = {part.path(index) for part in (train, validation) for index in range(len(part))}
    assert len(paths) == 18
    for part in (train, validation):
        for index in range(len(part)):
            assert part.path(index).parts[-3] == sorted(WNIDS)[part.labels[index]]


def test_no_validation(make):
    data = make(validation=0)
    data.setup("fit")
    assert len(data.train_set) == 18
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="there are no validation images"):
        data.setup("validate")
    with pytest.raises(ValueError, match="validation must be less than the 18 training images, got 18"):
        make(validation=18).open("train")


def test_published_corruptions(make):
    data = make(domains=["fog", "clean"], severity=3, stream=PerDomain(shuffle=False))
    images, labels = shown(data)
    assert [(domain.name, domain.severity) for domain in data.stream.domains] == [("fog", 3), ("clean", 0)]
    for image, label in zip(images[:3], labels[:3].tolist(), strict=True):
        seed = 7 + WNIDS.index(sorted(WNIDS)[label])
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(seed))


def test_made_corruptions(make):
    clean = make().load("validation")
    data = make(domains=["fog"], severity=2, generate=True, stream_split="validation", stream=PerDomain(shuffle=False))
    images, labels = shown(data)
    assert torch.equal(images, corrupt(clean.images, "fog", 2, table="tiny_imagenet", chunk_size=50))
    assert torch.equal(labels, clean.labels)


def test_published_corruptions_are_of_the_test_images(make):
    with pytest.raises(ValueError, match=r"Tiny-ImageNet-C was made from the test images.*generate: true"):
        make(domains=["fog"], stream_split="validation").setup("test")


def test_missing_folders(make, root):
    with pytest.raises(FileNotFoundError, match=r"no folder snow in .*Tiny-ImageNet-C; there are fog"):
        make(domains=["snow"], severity=3).setup("test")
    shutil.rmtree(root / "Tiny-ImageNet-C")
    with pytest.raises(FileNotFoundError, match=r"no Tiny-ImageNet-C folder in .*zenodo.*generate: true"):
        make(domains=["fog"]).setup("test")
    with pytest.raises(FileNotFoundError, match=r"no tiny-imagenet-200 folder in /nowhere.*cs231n"):
        make(root="/nowhere").setup("fit")


@pytest.mark.parametrize("content", ["", "val_0_0.JPEG n03\n", "val_0_0.JPEG\tn99\t0\n"])
def test_damaged_annotations(make, root, content):
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(content)
    with pytest.raises(ValueError, match=r"val_annotations.txt must have lines of a file name, a tab"):
        make().setup("test")
