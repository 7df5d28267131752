"""Wide residual networks for 32-pixel images, registered with timm as cifar_wrn28_10 and cifar_wrn40_2."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ttalight.errors import InputError
from ttalight.models.cifar.cifar_network import CifarNetwork, cifar_cfg, draw_weights

__all__ = ["CifarWideResNet"]

# What the public weights expect: those of RobustBench's "Standard" take images as they are, AugMix's take [-1, 1].
default_cfgs = generate_default_cfgs({
    "cifar_wrn28_10": cifar_cfg(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "cifar_wrn40_2": cifar_cfg(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
})  # fmt: skip


class _Block(nn.Module):
    """Twice norm, ReLU, 3x3 convolution; a shortcut that changes the width starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.shortcut: nn.Conv2d | None = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        residual = self.act2(self.bn2(self.conv1(activated)))
        if self.drop_rate:
            residual = F.dropout(residual, p=self.drop_rate, training=self.training)
        kept = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = kept + self.conv2(residual)
        return out


class CifarWideResNet(CifarNetwork):
    """The wide residual network of 6n + 4 layers for CIFAR, with timm's interface.

    A 3x3 convolution to 16 channels, three stages of n pre-activation blocks with 16 k, 32 k and 64 k channels at
    strides 1, 2 and 2, norm, ReLU, global pooling and a linear layer.

    Source: S. Zagoruyko and N. Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146. The public weights
    of RobustBench (WRN-28-10 "Standard" and its adversarially trained ones, which may carry an unused ``sub_block1``),
    of AugMix (WRN-40-2) and of TRADES have one set of names, which load here.

    Args:
        depth: Number of layers, 6n + 4 with n >= 1.
        widen_factor: The factor k.
        num_classes: Number of classes; 0 leaves the pooled features as the output.
        in_chans: Channels of the images.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for maps (with ``num_classes=0``).
        drop_rate: Probability of dropout before the classifier.
        block_drop_rate: Probability of dropout between the two convolutions of a block.

    Raises:
        ValueError: If the depth is not 6n + 4, or there are classes but no pooling.
    """

    public_names = (
        (r"^sub_block1\..*", ""),
        (r"^(block\d)\.layer\.", r"\1."),
        (r"\.convShortcut\.", ".shortcut."),
    )

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, ...), got {depth}")
        blocks = (depth - 4) // 6
        widths = [16 * widen_factor << stage for stage in range(3)]
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 1 << stage, "module": f"block{stage + 1}"}
            for stage, width in enumerate(widths)
        ]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, widths[0], blocks, 1, block_drop_rate)
        self.block2 = _stage(widths[0], widths[1], blocks, 2, block_drop_rate)
        self.block3 = _stage(widths[1], widths[2], blocks, 2, block_drop_rate)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.act1 = nn.ReLU(inplace=True)
        self.reset_classifier(num_classes, global_pool)
        draw_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (B, 64 k, H / 4, W / 4) of images (B, in_chans, H, W)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        out: Tensor = self.act1(self.bn1(x))
        return out


def _stage(in_channels: int, channels: int, blocks: int, stride: int, drop_rate: float) -> nn.Sequential:
    return nn.Sequential(
        _Block(in_channels, channels, stride, drop_rate),
        *(_Block(channels, channels, 1, drop_rate) for _ in range(blocks - 1)),
    )


def _create(name: str, pretrained: bool, **kwargs: Any) -> CifarWideResNet:
    model: CifarWideResNet = build_model_with_cfg(
        CifarWideResNet, name, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs
    )
    return model


@register_model
def cifar_wrn28_10(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-28-10 for CIFAR."""
    return _create("cifar_wrn28_10", pretrained, **{"depth": 28, "widen_factor": 10, **kwargs})


@register_model
def cifar_wrn40_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-2 for CIFAR."""
    return _create("cifar_wrn40_2", pretrained, **{"depth": 40, "widen_factor": 2, **kwargs})
