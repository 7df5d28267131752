"""Where the last block of a network begins, whatever its modules are called."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ttalight.models.norm import NormLayer

__all__ = ["norms_before_last_block"]


def norms_before_last_block(network: nn.Module, norms: Sequence[NormLayer]) -> list[NormLayer]:
    """Return the normalisation layers in front of the last quarter of a network's blocks.

    Blocks are the children of the innermost module that holds, among its children, several with two normalisation
    layers or more: the stages of a ResNet, a ConvNeXt or a Swin transformer, the blocks of a vision transformer. A
    quarter of them, at least one, and everything behind counts as the last block: stage 4 of 4, blocks 10 to 12 of 12
    with the final norm. Networks without such blocks count their normalisation layers themselves. The rule is one of
    depth, since names differ: the selections of SAR's and DeYO's authors by name miss torchvision's transformers and
    hit the middle of a ViT-L.

    Args:
        network: The network.
        norms: Its normalisation layers in order.

    Returns:
        The layers in front, in order.
    """
    names = [norm.name for norm in norms]
    blocks = _blocks(network, "", names)
    if blocks:
        last = blocks[-_quarter(len(blocks))]
        begin = next(index for index, name in enumerate(names) if name.startswith(f"{last}."))
    else:
        begin = len(norms) - _quarter(len(norms))
    return list(norms[:begin])


def _blocks(module: nn.Module, path: str, names: Sequence[str]) -> list[str]:
    children = [(child, f"{path}.{name}" if path else name) for name, child in module.named_children()]
    holders = [(child, at) for child, at in children if sum(name.startswith(f"{at}.") for name in names) >= 2]
    if len(holders) == 1:
        return _blocks(*holders[0], names)
    return [at for _, at in holders]


def _quarter(count: int) -> int:
    return math.ceil(count / 4)
