"""Normalisation layers in front of the last block: by depth, and as the public code of SAR and DeYO."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from torch import nn

from ttalight.models import find_norms
from ttalight.models.depth import norms_before_last_block

TIMM = {
    "resnet50": "layer4.",
    "vit_base_patch16_224": "blocks.9.",
    "vit_large_patch16_224": "blocks.18.",
    "convnext_tiny": "stages.3.",
    "swin_tiny_patch4_window7_224": "layers.3.",
    "cifar_preact_resnet18": "layer4.",
}
TORCHVISION = {
    "resnet18": "layer4.",
    "vit_b_16": "encoder.layers.encoder_layer_9.",
    "vit_l_16": "encoder.layers.encoder_layer_18.",
    "swin_t": "features.7.",
    "convnext_tiny": "features.7.",
}


def check(network: nn.Module, first_left_out: str) -> None:
    norms = find_norms(network)
    front = norms_before_last_block(network, norms)
    assert [norm.name for norm in front] == [norm.name for norm in norms[: len(front)]]
    assert norms[len(front)].name.startswith(first_left_out)
    assert not front[-1].name.startswith(first_left_out)


@pytest.mark.parametrize(("name", "first"), TIMM.items())
def test_timm(name, first):
    with torch.device("meta"):
        network = timm.create_model(name)
    check(network, first)


@pytest.mark.parametrize(("name", "first"), TORCHVISION.items())
def test_torchvision(name, first):
    with torch.device("meta"):
        network = getattr(torchvision.models, name)()
    check(network, first)


def test_inside_a_task():
    check(nn.ModuleDict({"normalize": nn.Identity(), "encoder": timm.create_model("resnet18")}), "encoder.layer4.")


def public_selection(network: nn.Module) -> list[str]:
    """The names that the public code of SAR and DeYO does not skip."""
    skipped = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
        if not any(part in name for part in skipped) and name != "norm"
    ]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("cifar_resnet20", 0), ("cifar_resnet26_gn", 1), ("cifar_wrn28_10", 0), ("cifar_resnext29_4x32d", 0),
        ("resnet50", 10), ("vit_base_patch16_224", 7),
    ],
)  # fmt: skip
def test_adapts_what_the_public_code_adapts(name, left_out):
    with torch.device("meta"):
        network = timm.create_model(name)
    norms = find_norms(network)
    front = [norm.name for norm in norms_before_last_block(network, norms)]
    assert front == public_selection(network)
    assert len(norms) - len(front) == left_out


def test_final_norm_inside_a_task():
    task = nn.ModuleDict({"normalize": nn.Identity(), "encoder": timm.create_model("cifar_resnet26_gn")})
    norms = find_norms(task)
    front = [norm.name for norm in norms_before_last_block(task, norms)]
    assert front == [norm.name for norm in norms if norm.name != "encoder.norm"]


def test_without_blocks_all_layers_adapt():
    network = nn.Sequential(*(nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(3))) for _ in range(5)))
    assert [norm.name for norm in norms_before_last_block(network, find_norms(network))] == [
        "0.norm", "1.norm", "2.norm", "3.norm", "4.norm",
    ]  # fmt: skip
    one = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(3)))
    assert [norm.name for norm in norms_before_last_block(one, find_norms(one))] == ["norm"]
