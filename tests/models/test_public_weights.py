"""The public weight files of the CIFAR networks: names, shapes, and that the same numbers give the same logits.

The files are described here by hand, name by name, and evaluated by plain functions on those names.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ttalight.models import create_encoder
from ttalight.models.weight_files import convert_state_dict, public_weights
from ttalight.tasks import SupervisedTask

# -- the files: name -> shape


def norm(name, channels, running=True):
    shapes = {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
    if running:
        shapes |= {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
        shapes |= {f"{name}.num_batches_tracked": ()}
    return shapes


def conv(name, inputs, outputs, kernel):
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def wide_resnet_file(depth, factor, classes, sub_block=False):
    """RobustBench's "Standard", AugMix, TRADES."""
    shapes = conv("conv1", 3, 16, 3)
    before = 16
    names = ["block1", "block2", "block3"]
    for stage, name in enumerate(names):
        width = 16 * factor * 2**stage
        for index in range((depth - 4) // 6):
            block = f"{name}.layer.{index}"
            inputs = before if index == 0 else width
            shapes |= norm(f"{block}.bn1", inputs) | conv(f"{block}.conv1", inputs, width, 3)
            shapes |= norm(f"{block}.bn2", width) | conv(f"{block}.conv2", width, width, 3)
            if inputs != width:
                shapes |= conv(f"{block}.convShortcut", inputs, width, 1)
        before = width
    if sub_block:
        shapes |= {f"sub_{name}": shape for name, shape in shapes.items() if name.startswith("block1.")}
    return shapes | norm("bn1", before) | linear("fc", before, classes)


def resnext_file(depth, cardinality, base_width, classes):
    """AugMix, RobustBench."""
    shapes = conv("conv_1_3x3", 3, 64, 3) | norm("bn_1", 64)
    before = 64
    for stage in range(3):
        planes = 64 * 2**stage
        inner = int(planes * base_width / 64) * cardinality
        for index in range((depth - 2) // 9):
            block = f"stage_{stage + 1}.{index}"
            inputs = before if index == 0 else 4 * planes
            shapes |= conv(f"{block}.conv_reduce", inputs, inner, 1) | norm(f"{block}.bn_reduce", inner)
            shapes |= conv(f"{block}.conv_conv", inner // cardinality, inner, 3) | norm(f"{block}.bn", inner)
            shapes |= conv(f"{block}.conv_expand", inner, 4 * planes, 1) | norm(f"{block}.bn_expand", 4 * planes)
            if index == 0:
                shapes |= conv(f"{block}.downsample.0", inputs, 4 * planes, 1)
                shapes |= norm(f"{block}.downsample.1", 4 * planes)
        before = 4 * planes
    return shapes | linear("classifier", before, classes)


def group_norm_file(depth, width, classes):
    """Test-time training, MEMO."""
    shapes = conv("conv1", 3, 16, 3)
    before = 16
    for stage in range(3):
        outputs = width * 2**stage
        for index in range((depth - 2) // 6):
            block = f"layer{stage + 1}.{index}"
            inputs = before if index == 0 else outputs
            shapes |= norm(f"{block}.bn1", inputs, running=False) | conv(f"{block}.conv1", inputs, outputs, 3)
            shapes |= norm(f"{block}.bn2", outputs, running=False) | conv(f"{block}.conv2", outputs, outputs, 3)
        before = outputs
    return shapes | norm("bn", before, running=False) | linear("fc", before, classes)


def preact_file(width, classes, final_norm=True):
    """RobustBench (with the last norm), kuangliu/pytorch-cifar (without)."""
    shapes = conv("conv1", 3, width, 3)
    before = width
    for stage in range(4):
        outputs = width * 2**stage
        for index in range(2):
            block = f"layer{stage + 1}.{index}"
            inputs = before if index == 0 else outputs
            shapes |= norm(f"{block}.bn1", inputs) | conv(f"{block}.conv1", inputs, outputs, 3)
            shapes |= norm(f"{block}.bn2", outputs) | conv(f"{block}.conv2", outputs, outputs, 3)
            if stage and index == 0:
                shapes |= conv(f"{block}.shortcut.0", inputs, outputs, 1)
        before = outputs
    return shapes | (norm("bn", before) if final_norm else {}) | linear("linear", before, classes)


def resnet_file(classes):
    """ResNet-18 of kuangliu/pytorch-cifar and RobustBench."""
    shapes = conv("conv1", 3, 64, 3) | norm("bn1", 64)
    before = 64
    for stage in range(4):
        outputs = 64 * 2**stage
        for index in range(2):
            block = f"layer{stage + 1}.{index}"
            inputs = before if index == 0 else outputs
            shapes |= conv(f"{block}.conv1", inputs, outputs, 3) | norm(f"{block}.bn1", outputs)
            shapes |= conv(f"{block}.conv2", outputs, outputs, 3) | norm(f"{block}.bn2", outputs)
            if stage and index == 0:
                shapes |= conv(f"{block}.shortcut.0", inputs, outputs, 1) | norm(f"{block}.shortcut.1", outputs)
        before = outputs
    return shapes | linear("linear", before, classes)


def weights(shapes, seed=0):
    """A file of those names and shapes, with numbers that keep activations in range."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) == 1:
            state[name] = torch.rand(shape, generator=generator) + (0.5 if name.endswith(("weight", "var")) else -0.5)
        else:
            fan_in = int(np.prod(shape[1:]))
            state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return state


# -- the networks, as functions of the files


def bn(state, name, x):
    return F.batch_norm(
        x, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")), False
    )


def wide_resnet(state, x):
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        blocks = len([key for key in state if key.startswith(f"block{stage}.") and key.endswith("conv1.weight")])
        for index in range(blocks):
            name = f"block{stage}.layer.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            first = bn(state, f"{name}.bn1", x).relu()
            out = F.conv2d(first, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(bn(state, f"{name}.bn2", out).relu(), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.convShortcut.weight" in state:
                x = F.conv2d(first, state[f"{name}.convShortcut.weight"], stride=stride)
            x = x + out
    return F.linear(bn(state, "bn1", x).relu().mean((2, 3)), state["fc.weight"], state["fc.bias"])


def resnext(state, x):
    x = bn(state, "bn_1", F.conv2d(x, state["conv_1_3x3.weight"], padding=1)).relu()
    for stage in (1, 2, 3):
        blocks = len([key for key in state if key.startswith(f"stage_{stage}.") and key.endswith("conv_conv.weight")])
        for index in range(blocks):
            name = f"stage_{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            out = bn(state, f"{name}.bn_reduce", F.conv2d(x, state[f"{name}.conv_reduce.weight"])).relu()
            kernel = state[f"{name}.conv_conv.weight"]
            groups = out.shape[1] // kernel.shape[1]
            out = F.conv2d(out, kernel, stride=stride, padding=1, groups=groups)
            out = F.conv2d(bn(state, f"{name}.bn", out).relu(), state[f"{name}.conv_expand.weight"])
            if index == 0:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                x = bn(state, f"{name}.downsample.1", x)
            x = (x + bn(state, f"{name}.bn_expand", out)).relu()
    return F.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


def group_norm_resnet(state, x):
    def gn(name, x):
        return F.group_norm(x, 8, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        blocks = len([key for key in state if key.startswith(f"layer{stage}.") and key.endswith("conv1.weight")])
        for index in range(blocks):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            out = F.conv2d(gn(f"{name}.bn1", x).relu(), state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(gn(f"{name}.bn2", out).relu(), state[f"{name}.conv2.weight"], padding=1)
            if stride == 2:
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
                x = torch.cat([x, torch.zeros_like(x)], 1)
            x = x + out
    return F.linear(gn("bn", x).relu().mean((2, 3)), state["fc.weight"], state["fc.bias"])


def preact(state, x):
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for index in (0, 1):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            first = bn(state, f"{name}.bn1", x).relu()
            out = F.conv2d(first, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(bn(state, f"{name}.bn2", out).relu(), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in state:
                x = F.conv2d(first, state[f"{name}.shortcut.0.weight"], stride=stride)
            x = x + out
    if "bn.weight" in state:
        x = bn(state, "bn", x).relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def resnet(state, x):
    x = bn(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for stage in (1, 2, 3, 4):
        for index in (0, 1):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            out = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(bn(state, f"{name}.bn1", out).relu(), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in state:
                x = bn(state, f"{name}.shortcut.1", F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride))
            x = (x + bn(state, f"{name}.bn2", out)).relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


# name, file at full size, parameters where they are widely known, arguments and file of a small twin, function
FAMILIES = {
    "cifar_wrn28_10": (
        wide_resnet_file(28, 10, 10), 36_479_194,
        {"depth": 16, "widen_factor": 1}, wide_resnet_file(16, 1, 10, sub_block=True), wide_resnet,
    ),
    "cifar_wrn40_2": (
        wide_resnet_file(40, 2, 10), 2_243_546,
        {"depth": 10, "widen_factor": 2}, wide_resnet_file(10, 2, 10), wide_resnet,
    ),
    "cifar_resnext29_4x32d": (
        resnext_file(29, 4, 32, 10), None,
        {"depth": 20, "cardinality": 4, "base_width": 16}, resnext_file(20, 4, 16, 10), resnext,
    ),
    "cifar_resnet26_gn": (
        group_norm_file(26, 16, 10), None,
        {"depth": 14}, group_norm_file(14, 16, 10), group_norm_resnet,
    ),
    "cifar_preact_resnet18": (
        preact_file(64, 10), None, {"width": 8}, preact_file(8, 10), preact,
    ),
    "cifar_preact_resnet18_plain": (
        preact_file(64, 10, final_norm=False), 11_171_146,
        {"width": 8}, preact_file(8, 10, final_norm=False), preact,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_of_the_public_file(name):
    file, parameters = FAMILIES[name][:2]
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=10)
        state = {key: torch.empty(shape) for key, shape in file.items()}
    own = network.state_dict()
    converted = convert_state_dict(state, network)
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in own.items()}
    assert parameters in (None, sum(parameter.numel() for parameter in network.parameters()))
    assert convert_state_dict(own, network).keys() == own.keys()  # own names stay


@pytest.mark.parametrize("name", FAMILIES)
def test_same_numbers_give_the_same_logits(name):
    _, _, arguments, file, function = FAMILIES[name]
    state = weights(file)
    network = timm.create_model(name, num_classes=10, **arguments).eval()
    network.load_state_dict(convert_state_dict(state, network))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(network(images), function(state, images), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network(images)[0], network(images)[1], rtol=1e-3)  # the images matter


def test_standard_resnet_18_becomes_timm_s(tmp_path):
    state = weights(resnet_file(10))
    torch.save(
        {"net": {f"module.{key}": value for key, value in state.items()}, "acc": np.float64(93.02)}, tmp_path / "a"
    )
    encoder = create_encoder("resnet18", pretrained=str(tmp_path / "a")).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = F.linear(encoder(images), state["linear.weight"], state["linear.bias"])
        torch.testing.assert_close(logits, resnet(state, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "container", "normalisation"),
    [("cifar_wrn40_2", "state_dict", (0.5, 0.5)), ("cifar_resnet26_gn", "net", (0.5, 0.5)), ("resnet18", "net", None)],
)
def test_task_takes_the_file_with_its_classifier(tmp_path, name, container, normalisation):
    file, function = (resnet_file(10), resnet) if name == "resnet18" else (FAMILIES[name][0], FAMILIES[name][4])
    state = weights(file)
    content = {container: {f"module.{key}": value for key, value in state.items()}, "err_cls": np.float64(0.09)}
    torch.save(content, tmp_path / "ckpt.pth")
    task = SupervisedTask(encoder=name, weights=str(tmp_path / "ckpt.pth")).eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = normalisation or (task.normalize.mean[:, None, None], task.normalize.std[:, None, None])
    with torch.no_grad():
        expected = function(state, (images - mean) / std)
        torch.testing.assert_close(task(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("container", ["state_dict", "model", "net", "last", None])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_containers_and_prefixes(container, prefix):
    network = timm.create_model("cifar_wrn40_2", depth=10, widen_factor=1)
    state = {f"{prefix}{key}": value for key, value in weights(wide_resnet_file(10, 1, 10)).items()}
    file = public_weights({container: state, "epoch": 3} if container else state, network)
    network.load_state_dict(file.weights)
    assert (file.mean, file.std) == (None, None)


@pytest.mark.parametrize(
    ("names", "shape"), [(("mu", "sigma"), (1, 3, 1, 1)), (("normalize.mean", "normalize.std"), (3,))]
)
def test_normalisation_of_a_file_becomes_the_network_s(tmp_path, names, shape):
    state = weights(wide_resnet_file(40, 2, 10))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(shape), torch.tensor([0.4, 0.5, 0.6]).view(shape)
    torch.save(state | dict(zip(names, (mean, std), strict=True)), tmp_path / "a.pt")
    encoder = create_encoder("cifar_wrn40_2", pretrained=str(tmp_path / "a.pt"))
    assert encoder.pretrained_cfg["mean"] == pytest.approx((0.1, 0.2, 0.3))
    assert encoder.pretrained_cfg["std"] == pytest.approx((0.4, 0.5, 0.6))
    torch.save(state, tmp_path / "b.pt")
    assert create_encoder("cifar_wrn40_2", pretrained=str(tmp_path / "b.pt")).pretrained_cfg["mean"] == (0.5,) * 3


def test_file_without_tensors():
    with pytest.raises(ValueError, match="a dict without tensors"):
        public_weights({"epoch": 3}, nn.Identity())


@pytest.mark.parametrize("name", ["cifar_wrn40_2", "cifar_resnet26_gn", "cifar_preact_resnet18"])
def test_interface_of_timm(name):
    arguments = FAMILIES[name][2]
    model = timm.create_model(name, num_classes=7, in_chans=1, global_pool="max", **arguments).eval()
    images = torch.rand(2, 1, 32, 32)
    maps = model.forward_features(images)
    assert maps.shape[:2] == (2, model.num_features)
    pooled = model.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(pooled, maps.amax((2, 3)))
    torch.testing.assert_close(model(images), model.get_classifier()(pooled))
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, model.num_features)
    levels = timm.create_model(name, features_only=True, **arguments)(torch.rand(2, 3, 32, 32))
    assert [level.shape[1] for level in levels] == [info["num_chs"] for info in model.feature_info]


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("cifar_wrn40_2", 12, r"6n \+ 4"),
        ("cifar_resnext29_4x32d", 12, r"9n \+ 2"),
        ("cifar_resnet26_gn", 9, r"6n \+ 2"),
    ],
)
def test_impossible_depths(name, depth, message):
    with pytest.raises(ValueError, match=f"depth must be {message}.*got {depth}"):
        timm.create_model(name, depth=depth)
