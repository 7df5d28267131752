"""The last block by depth, whatever the modules are called."""

from __future__ import annotations

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
    "cifar_resnet20": "layer3.",
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


def test_without_blocks_the_layers_count():
    network = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(5)))
    assert [norm.name for norm in norms_before_last_block(network, find_norms(network))] == ["0", "1", "2"]
