"""Alignment whose student starts as a copy of a pretrained model, and test time on it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from ttalight.adapters import TestTimeTraining
from ttalight.data import ImageArrays, ImageDataModule
from ttalight.tasks import AlignmentTask, ContrastiveTask, CrossTaskTTT, SupervisedTask

NETWORK = {"encoder": "test_efficientnet", "stem": "imagenet"}
SIZE = {"image_size": 32}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return timm.create_model("test_efficientnet", num_classes=10).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """A file of a network of timm's with a classifier for ten classes."""
    path = tmp_path_factory.mktemp("timm") / "network.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def aligned(weights, make_trainer, make_data, tmp_path_factory):
    """The checkpoint of three steps of alignment."""
    folder = tmp_path_factory.mktemp("align")
    task = AlignmentTask(supervised=weights, lr=1e-3, warmup_epochs=0, **SIZE, **NETWORK)
    make_trainer(folder).fit(task, datamodule=make_data())
    return str(folder / "checkpoints" / "last.ckpt")


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_starts_as_the_pretrained_model(network, weights, images):
    task = AlignmentTask(supervised=weights, **SIZE, **NETWORK).eval()
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(task(images), network((images - mean) / std))
        assert torch.equal(task.project(images), task.teach(images))
    assert task.source["file"] == weights


def test_pretrained_weights_say_the_size(network, weights):
    task = AlignmentTask(supervised=weights, **NETWORK)
    side = network.pretrained_cfg["input_size"][-1]
    assert task.crop.size == task.views.size == task.preprocessing.size == side


def test_the_student_alone_moves(weights, aligned):
    before, after = torch.load(weights, weights_only=True), torch.load(aligned, weights_only=True)["state_dict"]
    classifier = {name for name in before if name.startswith("classifier.")}
    for name in classifier:
        assert torch.equal(after[name], before[name])
    for name in before.keys() - classifier:
        assert torch.equal(after[f"teacher.encoder.{name}"], before[name]), name
    assert not torch.equal(after["encoder.conv_stem.weight"], before["conv_stem.weight"])
    assert not torch.equal(after["projector.weight"], torch.eye(len(after["projector.weight"])))


def test_its_file_adapts(aligned, images, make_trainer, make_data, tmp_path):
    task = CrossTaskTTT(aligned=aligned, **NETWORK).eval()
    saved = AlignmentTask.load_from_checkpoint(aligned, supervised=None).eval()
    assert task.crop.size == task.views.size == 32
    with torch.no_grad():
        assert torch.equal(task(images), saved(images))
    data = make_data(domains=["clean", "contrast"], limit=20)
    results = make_trainer(tmp_path).adapt(task, data, TestTimeTraining(steps=2, lr=1e-3))
    assert [row["samples"] for row in results["domains"]] == [20, 20]
    assert results["source"]["file"] == aligned


def test_a_checkpoint_is_copied_as_well(stages, images):
    source = SupervisedTask(weights=stages["source"], encoder="cifar_resnet8").eval()
    task = AlignmentTask(supervised=stages["source"], encoder="cifar_resnet8").eval()
    with torch.no_grad():
        torch.testing.assert_close(task(images), source(images))


def test_what_is_given_normalises_for_both(weights, stages):
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    for task in (
        AlignmentTask(supervised=weights, **given, **NETWORK),
        AlignmentTask(supervised=stages["source"], encoder="cifar_resnet8", **given),
    ):
        for normalize in (task.normalize, task.teacher["normalize"]):
            assert normalize.mean.flatten().tolist() == pytest.approx(given["mean"])
            assert normalize.std.flatten().tolist() == pytest.approx(given["std"])


def test_a_student_of_its_own_keeps_its_weights(weights, images, make_trainer, make_data, tmp_path):
    student = ContrastiveTask(pretrained=weights, mean=[0.1] * 3, std=[0.5] * 3, lr=1e-3, **SIZE, **NETWORK)
    make_trainer(tmp_path).fit(student, datamodule=make_data())
    file = str(tmp_path / "checkpoints" / "last.ckpt")
    task = AlignmentTask(supervised=weights, self_supervised=file, **SIZE, **NETWORK).eval()
    copied = AlignmentTask(supervised=weights, **SIZE, **NETWORK).eval()
    with torch.no_grad():
        assert torch.equal(task.project(images), student.eval()(images))
        assert torch.equal(task.teach(images), copied.teach(images))


def test_a_trained_teacher_leaves_its_copy(weights, make_trainer, make_data, tmp_path):
    task = AlignmentTask(supervised=weights, freeze_teacher=False, lr=1e-3, warmup_epochs=0, **SIZE, **NETWORK)
    make_trainer(tmp_path).fit(task, datamodule=make_data())
    teacher, student = task.teacher["encoder"].conv_stem.weight, task.encoder.conv_stem.weight
    start = torch.load(weights, weights_only=True)["conv_stem.weight"]
    assert not torch.equal(teacher, start)
    assert not torch.equal(teacher, student)


def test_a_classifier_that_is_a_convolution(images, tmp_path):
    network = timm.create_model("dla46_c", num_classes=10).eval()
    assert network.state_dict()["fc.weight"].shape[2:] == (1, 1)
    torch.save(network.state_dict(), tmp_path / "network.pth")
    task = AlignmentTask(supervised=str(tmp_path / "network.pth"), encoder="dla46_c", stem="imagenet").eval().double()
    network, images = network.double(), images.double()
    with torch.no_grad():
        torch.testing.assert_close(task(images), network(task.normalize(images)))


class TestDownload:
    """``true`` takes the weights that timm downloads, the classifier's with them."""

    @pytest.fixture
    def downloaded(self, monkeypatch):
        torch.manual_seed(5)
        make, network = timm.create_model, timm.create_model("test_efficientnet").eval()
        monkeypatch.setattr(
            timm,
            "create_model",
            lambda name, pretrained=False, **kwargs: copy.deepcopy(network) if pretrained else make(name, **kwargs),
        )
        return network

    @pytest.mark.parametrize(("kind", "argument"), [(AlignmentTask, "supervised"), (SupervisedTask, "weights")])
    def test_is_the_pretrained_model(self, downloaded, kind, argument, images):
        task = kind(**{argument: True}, num_classes=1000, **NETWORK).eval()
        mean, std = (torch.tensor(downloaded.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            torch.testing.assert_close(task(images), downloaded((images - mean) / std))
        assert task.source == {"file": "timm/test_efficientnet.r160_in1k", "sha256": None}

    def test_of_other_classes(self, downloaded):
        with pytest.raises(ValueError, match=r"supervised: what timm downloads does not fit.*classifier.weight \(1000"):
            AlignmentTask(supervised=True, **NETWORK)

    def test_that_fails(self):
        with pytest.raises(RuntimeError, match=r"timm could not get pretrained weights .*path of the file instead"):
            AlignmentTask(supervised=True, encoder="cifar_resnet8")


def test_at_224_pixels(make_trainer, tmp_path):
    class Photographs(ImageDataModule):
        num_classes, mean, std = 10, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)

        def load(self, split):
            draws = torch.Generator().manual_seed(len(split))
            images = torch.randint(256, (8, 3, 256, 256), dtype=torch.uint8, generator=draws)
            return ImageArrays(images, torch.arange(8))

    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "network.pth")
    network = {"encoder": "test_resnet", "stem": "imagenet"}
    shapes = set()

    def watched(task):
        task.encoder.register_forward_pre_hook(lambda module, inputs: shapes.add(tuple(inputs[0].shape[1:])))
        return task

    task = watched(AlignmentTask(supervised=str(tmp_path / "network.pth"), image_size=224, lr=1e-3, **network))
    before = task.encoder.conv1[0].weight.clone()
    trainer = make_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(task, datamodule=Photographs(batch_size=4))
    assert trainer.global_step == 2
    assert not torch.equal(task.encoder.conv1[0].weight, before)
    task = watched(CrossTaskTTT(aligned=str(tmp_path / "checkpoints" / "last.ckpt"), **network))
    adapter = TestTimeTraining(steps=1, lr=1e-3, reset="never")
    results = make_trainer(tmp_path).adapt(task, Photographs(batch_size=4, limit=4), adapter)
    assert (results["complete"], results["domains"][0]["samples"]) == (True, 4)
    assert not torch.equal(adapter.state_dict()["tensors"]["projector.weight"], task.projector.weight)
    assert shapes == {(3, 224, 224)}


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("efficientformerv2_s0", r"2 missing: classifier.bias, .*4 unexpected: .*encoder.head_dist.weight"),
            ("efficientvit_m0", r"5 unexpected: encoder.head.bn.bias, "),
        ],
    )
    def test_heads_of_another_kind(self, name, message, tmp_path):
        torch.save(timm.create_model(name, num_classes=10).state_dict(), tmp_path / "network.pth")
        with pytest.raises(ValueError, match=message):
            AlignmentTask(supervised=str(tmp_path / "network.pth"), encoder=name, stem="imagenet")

    def test_pretrained_beside_a_copy(self, weights):
        with pytest.raises(ValueError, match="starts as a copy of the supervised one: leave pretrained out"):
            AlignmentTask(supervised=weights, pretrained=weights, **NETWORK)

    def test_a_file_that_does_not_fit(self, weights, network, tmp_path):
        with pytest.raises(ValueError, match=r"^supervised: .*network.pth does not fit"):
            AlignmentTask(supervised=weights, encoder="cifar_resnet8")
        headless = {name: value for name, value in network.state_dict().items() if not name.startswith("classifier.")}
        torch.save(headless, tmp_path / "headless.pth")
        with pytest.raises(ValueError, match=r"supervised: .*2 missing: classifier.bias, classifier.weight"):
            AlignmentTask(supervised=str(tmp_path / "headless.pth"), **NETWORK)

    def test_a_checkpoint_of_another_task(self, stages):
        with pytest.raises(ValueError, match=r"supervised: .* was written by ContrastiveTask, expected .* Supervised"):
            AlignmentTask(supervised=stages["simclr"], encoder="cifar_resnet8")
