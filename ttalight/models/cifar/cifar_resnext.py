"""ResNeXt for 32-pixel images, registered with timm as cifar_resnext29_4x32d."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.models.cifar.cifar_network import CifarNetwork, cifar_cfg, draw_weights

__all__ = ["CifarResNeXt"]

default_cfgs = generate_default_cfgs({"cifar_resnext29_4x32d": cifar_cfg(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))})


class _Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions, each with a norm, beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.act1(self.bn1(self.conv1(x)))
        residual = self.act2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        kept = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act3(kept + residual)
        return out


class CifarResNeXt(CifarNetwork):
    """The ResNeXt of 9n + 2 layers for CIFAR, with timm's interface.

    A 3x3 convolution to 64 channels, three stages of n bottlenecks with 256, 512 and 1024 channels at strides 1, 2
    and 2, global pooling and a linear layer. The grouped convolution of a stage has ``cardinality`` groups of
    ``base_width`` channels, twice and four times as many in the later stages.

    Source: S. Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, arXiv 1611.05431.
    The public weights are AugMix's (D. Hendrycks et al., ICLR 2020, arXiv 1912.02781), also in RobustBench: four
    groups of 32 channels, which texts call ResNeXt-29 (32x4) and timm's names 4x32d.

    Args:
        depth: Number of layers, 9n + 2 with n >= 1.
        cardinality: Number of groups.
        base_width: Channels of a group in the first stage.
        num_classes: Number of classes; 0 leaves the pooled features as the output.
        in_chans: Channels of the images.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for maps (with ``num_classes=0``).
        drop_rate: Probability of dropout before the classifier.

    Raises:
        ValueError: If the depth is not 9n + 2, or there are classes but no pooling.
    """

    public_names = (
        (r"^conv_1_3x3\.", "conv1."),
        (r"^bn_1\.", "bn1."),
        (r"^stage_(\d)\.", r"layer\1."),
        (r"^classifier\.", "fc."),
        (r"\.(conv|bn)_reduce\.", r".\g<1>1."),
        (r"\.conv_conv\.", ".conv2."),
        (r"\.bn\.", ".bn2."),
        (r"\.(conv|bn)_expand\.", r".\g<1>3."),
    )

    def __init__(
        self,
        depth: int = 29,
        cardinality: int = 4,
        base_width: int = 32,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        if depth < 11 or (depth - 2) % 9:
            raise InputError(f"depth must be 9n + 2 with n >= 1 (11, 20, 29, ...), got {depth}")
        blocks = (depth - 2) // 9
        widths = [256 << stage for stage in range(3)]
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 1 << stage, "module": f"layer{stage + 1}"}
            for stage, width in enumerate(widths)
        ]
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = nn.ReLU(inplace=True)
        inner = cardinality * base_width
        self.layer1 = _stage(64, inner, widths[0], cardinality, blocks, stride=1)
        self.layer2 = _stage(widths[0], 2 * inner, widths[1], cardinality, blocks, stride=2)
        self.layer3 = _stage(widths[1], 4 * inner, widths[2], cardinality, blocks, stride=2)
        self.reset_classifier(num_classes, global_pool)
        draw_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (B, 1024, H / 4, W / 4) of images (B, in_chans, H, W)."""
        x = self.act1(self.bn1(self.conv1(x)))
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out


def _stage(in_channels: int, channels: int, out_channels: int, groups: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Bottleneck(in_channels, channels, out_channels, groups, stride),
        *(_Bottleneck(out_channels, channels, out_channels, groups, 1) for _ in range(blocks - 1)),
    )


@register_model
def cifar_resnext29_4x32d(pretrained: bool = False, **kwargs: Any) -> CifarResNeXt:
    """ResNeXt-29 for CIFAR, four groups of 32 channels."""
    model: CifarResNeXt = build_model_with_cfg(
        CifarResNeXt, "cifar_resnext29_4x32d", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs
    )
    return model
