"""A decoder that runs a residual network backwards: from deep maps to those in front of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = ["ReverseDecoder"]


class ReverseDecoder(nn.Module):
    """Fuses the maps of three stages into a small one and decodes them from it.

    The fusion brings the first two maps to the size of the third by convolutions of stride 2, joins the three and
    halves them once more, to twice the channels of the third. From there residual stages with transposed convolutions
    go back to the third, second and first map. Inputs of several streams go through it as one batch; each stream has
    its own last 1x1 convolution on every scale.

    The form is that of H. Deng, X. Li, *Anomaly Detection via Reverse Distillation from One-Class Embedding*, CVPR
    2022, arXiv 2201.10703, as used in ReC-TTT.

    Args:
        channels: Channels of the three maps, from the first stage to the third.
        streams: Number of streams.
        fusion_blocks: Residual blocks of the fusion.
        blocks: Residual blocks of the decoder's three stages, from deep to shallow.

    Raises:
        ValueError: If a number of blocks is below 1, or there are not three for the decoder.
    """

    def __init__(
        self, channels: Sequence[int], streams: int = 4, fusion_blocks: int = 3, blocks: Sequence[int] = (3, 4, 6)
    ) -> None:
        super().__init__()
        if len(blocks) != 3 or min(*blocks, fusion_blocks) < 1:
            raise InputError(f"needs three numbers of blocks, 1 or more each, got {list(blocks)} and {fusion_blocks}")
        first, second, third = channels
        self.streams = streams
        self.from_first = nn.Sequential(_halve(first, second), _halve(second, third))
        self.from_second = _halve(second, third)
        self.fuse = _stage(3 * third, 2 * third, fusion_blocks, up=False)
        widths = (2 * third, third, second, first)
        self.stages = nn.ModuleList(
            _stage(wide, narrow, number, up=True)
            for wide, narrow, number in zip(widths[:-1], widths[1:], blocks, strict=True)
        )
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(streams)) for width in widths[1:]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[list[Tensor]]:
        """Decode.

        Args:
            maps: Three maps (S * B, C, H, W), from the first stage to the third, of S streams one after the other.

        Returns:
            For each stream three maps (B, C, H, W) in the same order.

        Raises:
            ValueError: If a map is not half as wide as the one before, or the third has an odd side.
        """
        sizes = [tuple(values.shape[2:]) for values in maps]
        third = sizes[2]
        doubled = [tuple(factor * side for side in third) for factor in (4, 2)]
        if sizes[:2] != doubled or any(side % 2 for side in third):
            raise InputError(
                f"expected maps that halve from stage to stage, the third with even sides, got {sizes}: give images "
                "whose side the network halves without a rest, such as 32, 64 or 224"
            )
        joint = torch.cat([self.from_first(maps[0]), self.from_second(maps[1]), maps[2]], dim=1)
        decoded, scales = self.fuse(joint), []
        for stage, heads in zip(self.stages, self.heads, strict=True):
            decoded = stage(decoded)
            parts = decoded.chunk(self.streams)
            scales.append([head(part) for head, part in zip(heads, parts, strict=True)])  # type: ignore[call-overload]
        return [list(stream) for stream in zip(*reversed(scales), strict=True)]


class _Block(nn.Module):
    """Three convolutions beside a shortcut, with a quarter of the channels in the middle.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        change: ``down`` halves the side, ``up`` doubles it, ``none`` keeps side and channels.
    """

    def __init__(self, before: int, after: int, change: str = "none") -> None:
        super().__init__()
        width = max(1, after // 4)
        middle: nn.Module
        if change == "up":
            middle = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)
            shortcut: nn.Module = nn.ConvTranspose2d(before, after, 2, stride=2, bias=False)
        else:
            stride = 2 if change == "down" else 1
            middle = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
            shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)
        self.residual = nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            middle, nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.shortcut = nn.Identity() if change == "none" else nn.Sequential(shortcut, nn.BatchNorm2d(after))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.residual(x) + self.shortcut(x))
        return out


def _stage(before: int, after: int, blocks: int, *, up: bool) -> nn.Sequential:
    return nn.Sequential(
        _Block(before, after, "up" if up else "down"), *(_Block(after, after) for _ in range(blocks - 1))
    )


def _halve(before: int, after: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())
