from __future__ import annotations

import hashlib
import pickle
import tarfile

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ttalight.models import CifarResNet, Normalize

# Parameters of He et al. 2016, table 6 (0.27M, 0.46M, 0.66M, 0.85M, 1.7M), counted by hand from the layer sizes.
PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_is_registered_with_timm_and_has_its_depth(depth):
    model = timm.create_model(f"cifar_resnet{depth}", num_classes=10)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    if depth in PARAMETERS:
        assert _parameters(model) == PARAMETERS[depth]


def test_stages_halve_size_and_double_channels():
    maps = timm.create_model("cifar_resnet8", features_only=True)(torch.rand(2, 3, 32, 32))
    assert [tuple(level.shape) for level in maps] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_shortcut_subsamples_and_pads_channels():
    block = timm.create_model("cifar_resnet8", width=4).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_forward_is_head_after_features():
    model = timm.create_model("cifar_resnet14", num_classes=7, width=4).eval()
    images = torch.rand(3, 3, 32, 32)
    maps = model.forward_features(images)
    pooled = model.forward_head(maps, pre_logits=True)
    assert maps.shape == (3, model.num_features, 8, 8)
    torch.testing.assert_close(pooled, maps.mean((2, 3)))
    torch.testing.assert_close(model(images), F.linear(pooled, model.linear.weight, model.linear.bias))
    assert model.get_classifier() is model.linear


def test_classifier_can_be_replaced_and_removed():
    model = timm.create_model("cifar_resnet8", num_classes=10, width=4).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    assert model.num_classes == 5
    model.reset_classifier(4, "catavgmax")
    assert model.get_classifier().in_features == model.head_hidden_size == 2 * model.num_features
    assert model(images).shape == (2, 4)
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, model.num_features, 8, 8)


def test_timm_arguments_arrive():
    model = timm.create_model("cifar_resnet8", in_chans=1, num_classes=3, global_pool="max", width=8, drop_rate=0.5)
    assert model.num_features == 32
    images = torch.rand(2, 1, 28, 28)
    assert model(images).shape == (2, 3)
    assert not torch.equal(model.train()(images), model(images))  # dropout
    model.eval()
    maps = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(maps, pre_logits=True), maps.amax((2, 3)))
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["classifier"] == "linear"


def test_refuses_impossible_depths():
    with pytest.raises(ValueError, match=r"6n \+ 2.*got 21"):
        CifarResNet(21)
    with pytest.raises(ValueError, match="6n"):
        CifarResNet(2)
    with pytest.raises(ValueError, match="num_classes=0"):
        CifarResNet(8, num_classes=10, global_pool="")


def test_no_weights_can_be_downloaded():
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("cifar_resnet20", pretrained=True)


@pytest.mark.data
@pytest.mark.slow
def test_public_weights_reach_measured_accuracy(shared_data):
    with tarfile.open(shared_data / "cifar-10-test.tar.xz") as archive:
        content = archive.extractfile("cifar-10-batches-py/test_batch").read()
    assert hashlib.md5(content).hexdigest() == "40351d587109b95175f43aff81a1287e"
    batch = pickle.loads(content, encoding="latin1")
    images = torch.from_numpy(batch["data"]).view(-1, 3, 32, 32)[:1500]
    labels = torch.tensor(batch["labels"])[:1500]

    model = timm.create_model("cifar_resnet20", num_classes=10)
    state = torch.load(shared_data / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    normalize = Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    network = nn.Sequential(normalize, model).eval()
    with torch.inference_mode():
        right = sum(
            int((network(part / 255).argmax(1) == truth).sum())
            for part, truth in zip(images.split(500), labels.split(500), strict=True)
        )
    assert right == 1377  # 9,173 of all 10,000
