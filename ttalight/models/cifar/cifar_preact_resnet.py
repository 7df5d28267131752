"""Pre-activation ResNet-18 for 32-pixel images, registered with timm as cifar_preact_resnet18."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ttalight.models.cifar.cifar_network import CifarNetwork, cifar_cfg, draw_weights

__all__ = ["CifarPreActResNet"]

_CFG = cifar_cfg(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), pool_size=(4, 4))

default_cfgs = generate_default_cfgs({"cifar_preact_resnet18": _CFG, "cifar_preact_resnet18_plain": _CFG})


class _Block(nn.Module):
    """Twice norm, ReLU, 3x3 convolution; a shortcut with a convolution starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        residual = self.conv2(self.act2(self.bn2(self.conv1(activated))))
        kept = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = kept + residual
        return out


class CifarPreActResNet(CifarNetwork):
    """The pre-activation residual network of four stages for CIFAR, with timm's interface.

    A 3x3 convolution, four stages of pre-activation blocks with ``width``, 2, 4 and 8 times ``width`` channels at
    strides 1, 2, 2 and 2, norm and ReLU, global pooling and a linear layer.

    Source: K. He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv 1603.05027. Public weights
    differ in the end: RobustBench's (K. Kireev et al., L. Rice et al.) have the norm and ReLU of the paper before the
    classifier, kuangliu/pytorch-cifar's have neither: ``final_norm=False``, registered as cifar_preact_resnet18_plain.

    Args:
        blocks: Number of blocks in each stage.
        num_classes: Number of classes; 0 leaves the pooled features as the output.
        in_chans: Channels of the images.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for maps (with ``num_classes=0``).
        width: Channels of the first stage.
        drop_rate: Probability of dropout before the classifier.
        final_norm: Whether norm and ReLU follow the last block.

    Raises:
        ValueError: If there are classes but no pooling.
    """

    public_names = ((r"\.shortcut\.0\.", ".shortcut."), (r"^linear\.", "fc."))

    def __init__(
        self,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        width: int = 64,
        drop_rate: float = 0.0,
        final_norm: bool = True,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        self.num_features = self.head_hidden_size = 8 * width
        self.feature_info = [
            {"num_chs": width << stage, "reduction": 1 << stage, "module": f"layer{stage + 1}"} for stage in range(4)
        ]
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], stride=2)
        self.bn = nn.BatchNorm2d(8 * width) if final_norm else nn.Identity()
        self.act = nn.ReLU(inplace=True) if final_norm else nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        draw_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (B, 8 * width, H / 8, W / 8) of images (B, in_chans, H, W)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        out: Tensor = self.act(self.bn(x))
        return out


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(in_channels, channels, stride), *(_Block(channels, channels, 1) for _ in range(blocks - 1))
    )


def _create(name: str, pretrained: bool, **kwargs: Any) -> CifarPreActResNet:
    model: CifarPreActResNet = build_model_with_cfg(
        CifarPreActResNet, name, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3)}, **kwargs
    )
    return model


@register_model
def cifar_preact_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarPreActResNet:
    """Pre-activation ResNet-18 for CIFAR."""
    return _create("cifar_preact_resnet18", pretrained, **kwargs)


@register_model
def cifar_preact_resnet18_plain(pretrained: bool = False, **kwargs: Any) -> CifarPreActResNet:
    """Pre-activation ResNet-18 for CIFAR without norm and ReLU after the last block."""
    return _create("cifar_preact_resnet18_plain", pretrained, **{"final_norm": False, **kwargs})
