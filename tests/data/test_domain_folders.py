"""Sets of several domains: a folder a domain, and in it a folder a class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ttalight import Trainer
from ttalight.adapters import Source
from ttalight.data import DomainFoldersDataModule, Mixed, Potpourri
from ttalight.tasks import SupervisedTask

DOMAINS, CLASSES = ("art_painting", "cartoon", "photo"), ("dog", "elephant")


@pytest.fixture
def root(tmp_path):
    for domain in DOMAINS:
        for label, name in enumerate(CLASSES):
            for index in range(5):
                path = tmp_path / domain / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                grey = 100 * DOMAINS.index(domain) + 40 * label + index
                Image.fromarray(np.full((40, 50, 3), grey, dtype=np.uint8)).save(path)
    return tmp_path


@pytest.fixture
def make(root):
    def build(**arguments):
        defaults = {"root": str(root), "resize": 32, "num_workers": 0, "batch_size": 4, "validation": 0.2}
        return DomainFoldersDataModule(**(defaults | arguments))

    return build


def greys(part):
    """The grey level that each image of a set was painted with."""
    return sorted(int(part[index][0].flatten()[0]) for index in range(len(part)))


def test_sources_train_and_others_stream(make):
    data = make(sources=["art_painting", "cartoon"])
    data.setup("fit")
    data.setup("test")
    assert (len(data.train_set), len(data.validation_set), data.num_classes) == (16, 4, 2)
    assert sorted(greys(data.train_set) + greys(data.validation_set)) == sorted(
        100 * domain + 40 * label + index for domain in (0, 1) for label in (0, 1) for index in range(5)
    )
    assert np.bincount(data.validation_set.labels.numpy()).tolist() == [2, 2]
    assert [domain.name for domain in data.stream.domains] == ["photo"]
    images, labels = (torch.cat(field) for field in zip(*data.test_dataloader(), strict=True))
    assert len(images) == 10
    assert all((int(image.flatten()[0]) - 200) // 40 == label for image, label in zip(images, labels, strict=True))
    assert data.protocol()["sources"] == ["art_painting", "cartoon"]


def test_a_source_shows_its_held_out_images_only(make):
    data = make(sources=["cartoon"], domains=["cartoon", "photo"], stream=Mixed())
    data.setup("test")
    held_out = make(sources=["cartoon"])
    held_out.setup("fit")
    assert greys(data._stream_set.domains[0]) == greys(held_out.validation_set)
    assert len(data.stream) == 2 + 10


def test_classes_are_those_of_all_domains(make, root):
    """A domain without the first class must not shift the labels of the others."""
    for path in (root / "photo" / "dog").iterdir():
        path.unlink()
    (root / "photo" / "dog").rmdir()
    data = make(domains=["photo"])
    data.setup("test")
    assert data.num_classes == 2
    assert data._stream_set.domains[0].labels.tolist() == [1] * 5


def test_hyper_parameters_are_chosen_on_sources(make):
    data = make(sources=["photo"], domains=["photo"], stream_split="validation")
    data.setup("test")
    assert len(data.stream) == 2
    with pytest.raises(ValueError, match="stream_split is validation, and cartoon is not among the sources"):
        make(sources=["photo"], domains=["cartoon"], stream_split="validation").setup("test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domains": ["sketch"]}, r"no domain sketch in .*; there are art_painting, cartoon, photo"),
        ({"sources": ["clipart"]}, "no domain clipart in"),
        ({"sources": list(DOMAINS)}, "no domain beside the sources in"),
        ({"root": "/nowhere"}, r"there is no folder /nowhere \(TTALIGHT_DATA is .*--data.root"),
    ],
)
def test_missing_domains(make, arguments, message):
    with pytest.raises(FileNotFoundError, match=message):
        make(**arguments).setup("test")


def test_training_without_sources(make):
    with pytest.raises(ValueError, match="name the source domains by sources"):
        make().setup("fit")


def test_streams_that_want_clean_images(make):
    with pytest.raises(ValueError, match="Potpourri asks for clean images beside the domains"):
        make(stream=Potpourri(clean=True)).setup("test")


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_share(make, share):
    with pytest.raises(ValueError, match="validation must be a share from 0"):
        make(validation=share)


def test_train_and_adapt(make, tmp_path):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    task = SupervisedTask(encoder="cifar_resnet8", num_classes=2)
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(task, datamodule=make(sources=["art_painting", "cartoon"]))
    results = Trainer(**options).adapt(task, make(sources=["art_painting", "cartoon"]), Source())
    assert [(row["name"], row["samples"]) for row in results["domains"]] == [("photo", 10)]
