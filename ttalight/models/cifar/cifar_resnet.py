"""Residual networks for 32-pixel images, registered with timm as cifar_resnet8, 14, 20, 32, 44, 56 and 110.

Importing this module is what registers them: ``timm.create_model("cifar_resnet20", num_classes=10)`` works afterwards.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ttalight.models.cifar.cifar_network import CifarNetwork, cifar_cfg, draw_weights

__all__ = ["CifarResNet"]

# Mean and std are those of the widely used public weights (akamaster/pytorch_resnet_cifar10), not CIFAR's own.
_CFG = cifar_cfg(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classifier="linear")
_DEPTHS = (8, 14, 20, 32, 44, 56, 110)

default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _CFG for depth in _DEPTHS})


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.stride = stride
        self.missing_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, self.stride)  # every second pixel; slices would turn gradients from channels_last
        if self.missing_channels:
            before = self.missing_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.missing_channels - before))
        out: Tensor = self.act2(residual + x)
        return out


class CifarResNet(CifarNetwork):
    """The residual network of 6n + 2 layers for CIFAR, with timm's interface.

    A 3x3 convolution, three stages of n basic blocks with ``width``, 2 and 4 times ``width`` channels at strides 1, 2
    and 2, global pooling and a linear layer. Shortcuts have no parameters: where the resolution halves they take
    every second pixel and pad the new channels with zeros, half before and half after (option A of the paper).

    Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, section 4.2.
    Parameter names are those of the public weights of akamaster/pytorch_resnet_cifar10, which load once the prefix
    ``module.`` is taken off their keys. The initialisation of convolutions is normal with variance 2 / fan-out
    (K. He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv 1502.01852); the linear layer keeps torch's default.

    Args:
        depth: Number of layers, 6n + 2 with n >= 1.
        num_classes: Number of classes; 0 leaves the pooled features as the output.
        in_chans: Channels of the images.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for maps (with ``num_classes=0``).
        width: Channels of the first stage.
        drop_rate: Probability of dropout before the classifier.

    Raises:
        ValueError: If the depth is not 6n + 2, or there are classes but no pooling.
    """

    classifier_name = "linear"

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        width: int = 16,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        blocks = self.describe_three_stages(depth, width)
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.reset_classifier(num_classes, global_pool)
        draw_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (B, 4 * width, H / 4, W / 4) of images (B, in_chans, H, W)."""
        x = self.act1(self.bn1(self.conv1(x)))
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _BasicBlock(in_channels, channels, stride), *(_BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
    )


def _create(depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    model: CifarResNet = build_model_with_cfg(
        CifarResNet, f"cifar_resnet{depth}", pretrained, depth=depth, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs
    )
    return model


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 for CIFAR."""
    return _create(8, pretrained, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-14 for CIFAR."""
    return _create(14, pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR."""
    return _create(20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR."""
    return _create(32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR."""
    return _create(44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR."""
    return _create(56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR."""
    return _create(110, pretrained, **kwargs)
