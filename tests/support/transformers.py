"""Small vision transformers of random weights, in float64."""

from __future__ import annotations

import timm
import torch
import torchvision
from torch import nn


def _spread(net: nn.Module) -> nn.Module:
    """Make predictions and class tokens depend on the images."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net.double().eval()


def timm_vit(classes: int = 5, **settings: object) -> nn.Module:
    """Return a transformer of timm: three blocks, four tokens and the class token."""
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 6, "depth": 3, "num_heads": 2}
    return _spread(timm.models.VisionTransformer(num_classes=classes, **{**sizes, **settings}))


def torchvision_vit(classes: int = 5, **settings: object) -> nn.Module:
    """Return a transformer of torchvision of the same size."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 6, "mlp_dim": 12}
    return _spread(torchvision.models.VisionTransformer(num_classes=classes, **{**sizes, **settings}))
