"""The residual network with group normalisation for 32-pixel images, registered with timm as cifar_resnet26_gn."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ttalight.models.cifar.cifar_network import CifarNetwork, cifar_cfg, draw_weights

__all__ = ["CifarResNetGN"]

default_cfgs = generate_default_cfgs({"cifar_resnet26_gn": cifar_cfg(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))})


class _Block(nn.Module):
    """Twice norm, ReLU, 3x3 convolution, beside a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.stride = stride
        self.missing_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(self.act1(self.norm1(x)))
        residual = self.conv2(self.act2(self.norm2(residual)))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        if self.missing_channels:
            x = torch.cat([x, x.new_zeros(len(x), self.missing_channels, *x.shape[2:])], dim=1)
        out: Tensor = x + residual
        return out


class CifarResNetGN(CifarNetwork):
    """The pre-activation network of 6n + 2 layers with GroupNorm that test-time training was published with.

    A 3x3 convolution to 16 channels, three stages of n blocks with ``width``, 2 and 4 times ``width`` channels at
    strides 1, 2 and 2, norm, ReLU, global pooling and a linear layer. Where the resolution halves the shortcut
    averages 2x2 pixels; new channels are zeros behind the old ones.

    Source: Y. Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts",
    ICML 2020, arXiv 1909.13231. The public weights of its code, and those of MEMO (M. Zhang et al., NeurIPS 2022,
    arXiv 2110.09506) for the same network, load here; both are under "net" in their file, and both names say "bn"
    where GroupNorm is meant.

    Args:
        depth: Number of layers, 6n + 2 with n >= 1.
        groups: Groups of each normalisation.
        num_classes: Number of classes; 0 leaves the pooled features as the output.
        in_chans: Channels of the images.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for maps (with ``num_classes=0``).
        width: Channels of the first stage, a multiple of ``groups``.
        drop_rate: Probability of dropout before the classifier.

    Raises:
        ValueError: If the depth is not 6n + 2, or there are classes but no pooling.
    """

    public_names = ((r"(^|\.)bn(\d?)\.", r"\1norm\2."),)

    def __init__(
        self,
        depth: int = 26,
        groups: int = 8,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        width: int = 16,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        blocks = self.describe_three_stages(depth, width)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, width, groups, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, groups, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, groups, blocks, stride=2)
        self.norm = nn.GroupNorm(groups, 4 * width)
        self.act = nn.ReLU(inplace=True)
        self.reset_classifier(num_classes, global_pool)
        draw_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (B, 4 * width, H / 4, W / 4) of images (B, in_chans, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        out: Tensor = self.act(self.norm(x))
        return out


def _stage(in_channels: int, channels: int, groups: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(in_channels, channels, groups, stride),
        *(_Block(channels, channels, groups, 1) for _ in range(blocks - 1)),
    )


@register_model
def cifar_resnet26_gn(pretrained: bool = False, **kwargs: Any) -> CifarResNetGN:
    """ResNet-26 for CIFAR with GroupNorm of eight groups."""
    model: CifarResNetGN = build_model_with_cfg(
        CifarResNetGN, "cifar_resnet26_gn", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs
    )
    return model
