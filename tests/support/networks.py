"""Small networks of random weights, in float64."""

from __future__ import annotations

import torch
from torch import nn


def small_net(classes: int = 4, scale: float = 0.0) -> nn.Sequential:
    """Return two convolutions with a BatchNorm layer each, whose statistics no batch has, and a linear classifier.

    Args:
        classes: Number of classes.
        scale: Standard deviation of the classifier's weights; torch's own by default.
    """
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    if scale:
        nn.init.normal_(net[8].weight, std=scale)
    return net.double().eval()


def embedding_net(classes: int = 4, scale: float = 2.0) -> nn.Sequential:
    """Return a linear map of images of 2x2 pixels to features that point in all directions, and a linear classifier.

    Args:
        classes: Number of classes.
        scale: Standard deviation of the classifier's weights.
    """
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.Linear(6, classes))
    nn.init.normal_(net[1].weight, std=0.3)
    nn.init.normal_(net[2].weight, std=scale)
    return net.double().eval()
