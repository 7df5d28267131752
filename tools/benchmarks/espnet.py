"""ESPNet, a small network that segments street scenes, in the layout of its public weights.

S. Mehta, M. Rastegari, A. Caspi, L. Shapiro, H. Hajishirzi, *ESPNet: Efficient Spatial Pyramid of Dilated Convolutions
for Semantic Segmentation*, ECCV 2018, arXiv 1803.06815. Names of parameters are those of the authors' files, so that
these load strictly. As in the authors' class an attribute ``modules`` hides ``nn.Module.modules``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ESPNet", "espnet"]

_EPS = 1e-3


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = (kernel - 1) // 2 * dilation
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    part = nn.Sequential()
    part.add_module("conv", layer)
    return part


class _NormAct(nn.Module):
    """BatchNorm and PReLU, behind a convolution where there is one."""

    def __init__(self, channels: int, inputs: int | None = None, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False) if inputs else nn.Identity()
        self.bn, self.act = nn.BatchNorm2d(channels, eps=_EPS), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class _Pyramid(nn.Module):
    """A spatial pyramid of dilated convolutions: halves the resolution, or is added to its input."""

    def __init__(self, inputs: int, outputs: int, down: bool = False, residual: bool = True) -> None:
        super().__init__()
        narrow = outputs // 5
        self.residual = residual and not down
        self.c1 = _conv(inputs, narrow, 3, stride=2) if down else _conv(inputs, narrow, 1)
        self.d1 = _conv(narrow, outputs - 4 * narrow, 3)
        self.d2, self.d4, self.d8, self.d16 = (_conv(narrow, narrow, 3, dilation=rate) for rate in (2, 4, 8, 16))
        if down:
            self.bn, self.act = nn.BatchNorm2d(outputs, eps=_EPS), nn.PReLU(outputs)
        else:
            self.bn, self.act = _NormAct(outputs), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.c1(x)
        parts = [self.d1(narrow), self.d2(narrow)]
        for layer in (self.d4, self.d8, self.d16):
            parts.append(layer(narrow) + parts[-1])
        joined = torch.cat(parts, 1)
        y: Tensor = self.act(self.bn(x + joined if self.residual else joined))
        return y


class _Encoder(nn.Module):
    def __init__(self, classes: int, depths: tuple[int, int]) -> None:
        super().__init__()
        self.level1, self.b1 = _NormAct(16, 3, stride=2), _NormAct(16 + 3)
        self.level2_0 = _Pyramid(16 + 3, 64, down=True)
        self.level2 = nn.Sequential(*(_Pyramid(64, 64) for _ in range(depths[0])))
        self.b2 = _NormAct(128 + 3)
        self.level3_0 = _Pyramid(128 + 3, 128, down=True)
        self.level3 = nn.Sequential(*(_Pyramid(128, 128) for _ in range(depths[1])))
        self.b3 = _NormAct(256)
        self.classifier = _conv(256, classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = F.avg_pool2d(images, 3, 2, 1)
        first = self.level1(images)
        second = self.b1(torch.cat([first, half], 1))
        down = self.level2_0(second)
        third = self.b2(torch.cat([self.level2(down), down, F.avg_pool2d(half, 3, 2, 1)], 1))
        down = self.level3_0(third)
        deepest = self.b3(torch.cat([down, self.level3(down)], 1))
        return first, second, third, self.classifier(deepest)


class ESPNet(nn.Module):
    """Maps normalised BGR images, (B, 3, H, W) with sides that are multiples of 8, to logits (B, C, H, W).

    Args:
        classes: Number of outputs C.
        wide: Whether the last convolution reads the first layer's output with the image (19 channels), as the network
            for CamVid does, or alone (16), as the one for Cityscapes.
        depths: Blocks at a quarter and at an eighth of the resolution.
    """

    def __init__(self, classes: int = 12, wide: bool = True, depths: tuple[int, int] = (2, 8)) -> None:
        super().__init__()
        self.wide = wide
        self.encoder = _Encoder(classes, depths)
        self.level3_C = _conv(128 + 3, classes, 1)
        self.br = nn.BatchNorm2d(classes, eps=_EPS)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, stride=2, bias=False))
        self.combine_l2_l3 = nn.Sequential(_NormAct(2 * classes), _Pyramid(2 * classes, classes, residual=False))
        self.up_l2 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, stride=2, bias=False), _NormAct(classes))
        self.conv = _NormAct(classes, classes + (19 if wide else 16))
        self.classifier = nn.ConvTranspose2d(classes, classes, 2, stride=2, bias=False)
        self.modules = list(self.encoder.children())  # type: ignore[assignment, method-assign]

    def forward(self, images: Tensor) -> Tensor:
        first, second, third, deepest = self.encoder(images)
        up = self.up_l3(self.br(deepest))
        up = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(third), up], 1)))
        logits: Tensor = self.classifier(self.conv(torch.cat([up, second if self.wide else first], 1)))
        return logits


class _Prepared(nn.Module):
    """A network that takes RGB images in [0, 1]: colours in the order and range that it was trained with.

    Args:
        network: Takes BGR, (pixel - mean) / std / 255.
        mean: Means of the pixels, 0 to 255, B, G, R.
        std: Their standard deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((255 * images.flip(1) - self.mean) / (255 * self.std))
        return logits


def espnet(path: str, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Return a trained network for RGB images in [0, 1], (B, 3, H, W), in eval mode.

    Args:
        path: A file of the authors' weights.
        mean: Means of the pixels that it was trained with, 0 to 255, B, G, R.
        std: Their standard deviations.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    classes = len(state["br.weight"])
    network = ESPNet(classes, wide=state["conv.conv.weight"].shape[1] == classes + 19)
    missing, unexpected = network.load_state_dict(state, strict=False)
    faults = [name for name in (*missing, *unexpected) if not name.endswith("num_batches_tracked")]
    if faults:
        raise ValueError(f"{path} does not fit: {', '.join(faults[:4])}")
    return _Prepared(network, mean, std).eval()
