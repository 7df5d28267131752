"""Images are prepared as pretrained weights expect, unless an argument says otherwise, and one line says how."""

from __future__ import annotations

import logging
import math

import pytest
import timm
import torch
from torch import nn

from ttalight.models import create_encoder, preprocessing_of
from ttalight.tasks import ContrastiveTask, CrossTaskTTT, SupervisedTask

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Data:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    source_classes = None


class FakeTrainer:
    datamodule = Data()


def set_up(task):
    task._trainer = FakeTrainer()
    task.setup("test")
    return task


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of test_convnext's weights, an own normalisation beside them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(timm.create_model("test_efficientnet", num_classes=10).state_dict(), path)
    return str(path)


def normalisation(task):
    return tuple(task.normalize.mean.tolist()), tuple(task.normalize.std.tolist())


def approximately(values):
    return tuple(pytest.approx(part) for part in values)


def test_is_what_timm_s_configuration_says():
    network = timm.create_model("tf_efficientnet_lite0")
    found = preprocessing_of(network)
    assert (found.mean, found.std, found.interpolation) == ((0.5,) * 3, (0.5,) * 3, "bicubic")
    assert (found.size, found.resize) == (224, 256)
    network.pretrained_cfg = network.pretrained_cfg | {"crop_pct": 0.9}
    assert preprocessing_of(network).resize == math.floor(224 / 0.9)
    assert preprocessing_of(nn.Linear(1, 1)) is None


def test_a_replaced_stem_takes_any_size():
    found = preprocessing_of(create_encoder("resnet18"))
    assert (found.size, found.resize) == (None, None)
    assert preprocessing_of(create_encoder("resnet18", stem="imagenet")).size == 224


ENCODER = {"encoder": "test_efficientnet", "stem": "imagenet"}
CONFIG = timm.create_model("test_efficientnet").pretrained_cfg


class TestTask:
    def test_random_weights_take_the_data_s(self):
        task = set_up(SupervisedTask(**ENCODER))
        assert normalisation(task) == approximately((Data.mean, Data.std))
        assert task.crop.size is None
        assert task.preprocessing is None

    @pytest.mark.parametrize("argument", ["weights", "pretrained"])
    def test_pretrained_weights_take_their_own(self, weights, argument, caplog):
        with caplog.at_level(logging.INFO):
            task = set_up(SupervisedTask(**{argument: weights}, **ENCODER))
        assert normalisation(task) == approximately((CONFIG["mean"], CONFIG["std"]))
        assert task.crop.size == task.augment.size == CONFIG["input_size"][-1]
        line = next(record.getMessage() for record in caplog.records if "Preprocessing" in record.getMessage())
        assert "the model's pretrained configuration" in line
        assert f"size as delivered, crop {CONFIG['input_size'][-1]} (from the model's" in line

    def test_arguments_override_each_by_itself(self, weights, caplog):
        with caplog.at_level(logging.INFO):
            task = set_up(SupervisedTask(weights=weights, mean=MEAN, std=STD, **ENCODER))
        assert normalisation(task) == approximately((MEAN, STD))
        assert task.crop.size == CONFIG["input_size"][-1]
        assert "mean 0.5 0.5 0.5, std 0.25 0.25 0.25 (given)" in caplog.text
        task = set_up(SupervisedTask(weights=weights, image_size=48, **ENCODER))
        assert normalisation(task) == approximately((CONFIG["mean"], CONFIG["std"]))
        assert task.crop.size == 48

    def test_views_have_the_size(self, weights):
        task = set_up(ContrastiveTask(pretrained=weights, **ENCODER))
        assert task.views.size == task.crop.size == CONFIG["input_size"][-1]
        assert normalisation(task) == approximately((CONFIG["mean"], CONFIG["std"]))

    def test_a_file_s_own_normalisation_comes_first(self, tmp_path):
        state = timm.create_model("cifar_wrn40_2", depth=10, widen_factor=2).state_dict()
        extra = {"mu": torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), "sigma": torch.full((1, 3, 1, 1), 0.7)}
        full = timm.create_model("cifar_wrn40_2").state_dict()
        assert state.keys() < full.keys()
        torch.save({"state_dict": {f"module.{key}": value for key, value in (full | extra).items()}}, tmp_path / "a.pt")
        task = set_up(SupervisedTask(weights=str(tmp_path / "a.pt"), encoder="cifar_wrn40_2"))
        assert normalisation(task) == approximately(((0.1, 0.2, 0.3), (0.7, 0.7, 0.7)))
        assert torch.equal(task.classifier.weight, full["fc.weight"])

    @pytest.mark.parametrize(
        ("crop", "said"),
        [
            ("resized", "; augmentation RandomResizedCropFlip(size=None, scale=(0.3, 1.0), "),
            ("padded", "; augmentation RandomCropFlip(padding=4, flip=0.25)"),
            ("none", "; augmentation none"),
        ],
    )
    def test_training_says_its_augmentation(self, crop, said, caplog):
        task = SupervisedTask(encoder="cifar_resnet8", crop=crop, crop_scale=[0.3, 1.0], flip=0.25)
        task._trainer = FakeTrainer()
        with caplog.at_level(logging.INFO):
            task.setup("test")
            assert "augmentation" not in caplog.text
            task.setup("fit")
        assert said in caplog.text

    def test_line_names_another_scaling(self, weights, caplog):
        class Scaled(Data):
            resize, interpolation = 70, "bilinear"

        task = SupervisedTask(weights=weights, **ENCODER)
        line = task.preparation.describe(Scaled())
        wanted = task.preprocessing
        assert "size 70 bilinear, crop" in line
        assert line.endswith(f"; the model's pretrained configuration has size {wanted.resize} {wanted.interpolation}")
        Scaled.resize, Scaled.interpolation = wanted.resize, wanted.interpolation
        assert "pretrained configuration has" not in task.preparation.describe(Scaled())


class TestStages:
    """Later stages use the preprocessing of the first, from its file."""

    def checkpoint(self, task, path, **hyper_parameters):
        content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
        task.on_save_checkpoint(content)
        torch.save(content, path)
        return str(path)

    def test_size_and_normalisation_travel(self, weights, tmp_path):
        first = set_up(SupervisedTask(weights=weights, **ENCODER))
        file = self.checkpoint(first, tmp_path / "a.ckpt")
        second = set_up(SupervisedTask(weights=file, **ENCODER))
        assert second.crop.size == first.crop.size
        assert normalisation(second) == approximately((CONFIG["mean"], CONFIG["std"]))

    def test_arguments_override_the_file_s(self, weights, tmp_path):
        file = self.checkpoint(set_up(SupervisedTask(weights=weights, **ENCODER)), tmp_path / "a.ckpt")
        task = set_up(SupervisedTask(weights=file, mean=MEAN, std=STD, image_size=40, **ENCODER))
        assert normalisation(task) == approximately((MEAN, STD))
        assert task.crop.size == 40

    def test_views_of_a_later_stage_have_the_size(self):
        task = CrossTaskTTT(encoder="cifar_resnet8")
        task.set_image_size(24)
        assert task.views.size == task.crop.size == 24
