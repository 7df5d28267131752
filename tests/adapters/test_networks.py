"""Methods on small networks of the families that papers report: what moves, and what a release gives back."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from ttalight.adapters import EATA, SAR, DeYO, Tent

NETWORKS = {
    "wide_resnet": lambda: timm.create_model("cifar_wrn40_2", depth=10, widen_factor=1, num_classes=5),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=5),
    "vit": lambda: timm.create_model("test_vit", img_size=32, num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=[4, 4], num_classes=5
    ),
    "torchvision_vit": lambda: torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    ),
}
METHODS = {
    "Tent": lambda: Tent(lr=1e-3),
    "EATA": lambda: EATA(lr=1e-3, margin=1.0, redundancy=1.0, fisher="stream", fisher_weight=10.0),
    "SAR": lambda: SAR(lr=1e-3, margin=1.0),
    "DeYO": lambda: DeYO(lr=1e-3, margin=1.0, threshold=-1.0),
}


def names_of_affines(net: nn.Module) -> list[str]:
    return [
        f"{path}.{name}"
        for path, module in net.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
        for name, _ in module.named_parameters()
    ]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_norm_affines_alone_move(network, method, state_of, same_state):
    torch.manual_seed(0)
    net = NETWORKS[network]().double().train()
    for parameter in net.parameters():  # classifiers of some begin at zero
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    before, affines = state_of(net), names_of_affines(net)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    adapted = METHODS[method]().wrap(net)
    for scale in (1.0, 0.5):
        assert adapted(images * scale).shape == (4, 5)
    assert adapted.engine.updates == 2
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, before[0][name])]
    if method in ("SAR", "DeYO") and network not in ("wide_resnet", "convnext"):  # these have fewer than four blocks
        assert moved == [name for name in affines if name in moved]
        assert 0 < len(moved) < len(affines)
        assert affines[-1] not in moved
    else:
        assert moved == affines
    adapted.release()
    same_state(net, before)
