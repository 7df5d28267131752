"""A small task of test-time training."""

from __future__ import annotations

import torch
from torch import nn


class DrawingTask(nn.Module):
    """A network with a self-supervised loss that draws.

    Args:
        net: The network, whose first layers adapt.
    """

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)

    def adaptable_parameters(self):
        return self.net[:6].parameters()

    def auxiliary_loss(self, images, generator):
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype)
        return self.net(images + noise).square().mean(1)
