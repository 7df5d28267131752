"""Normalisation layers in front of the last block of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ttalight.models.norm import NormLayer

__all__ = ["norms_before_last_block"]


#: Fewest blocks of which the last ones are left out.
_FEWEST = 4


def norms_before_last_block(network: nn.Module, norms: Sequence[NormLayer]) -> list[NormLayer]:
    """Return the normalisation layers that SAR and DeYO adapt: those in front of the last quarter of the blocks.

    Blocks are the children of the innermost module that holds, among its children, several with two normalisation
    layers or more: the stages of a ResNet, a ConvNeXt or a Swin transformer, the blocks of a vision transformer. Of
    four blocks or more a quarter, rounded up, and everything behind is left out: stage 4 of 4, blocks 10 to 12 of 12
    with the final norm. That is what the public code of SAR (S. Niu et al., ICLR 2023, arXiv 2302.12400) and DeYO (J.
    Lee et al., ICLR 2024, arXiv 2403.07366) selects by name: it leaves out layer4, blocks.9 to blocks.11 and norm. The
    rule here is one of depth, since names miss torchvision's transformers and hit the middle of a ViT-L.

    Networks of fewer blocks, such as the three-stage residual networks for CIFAR, and networks without blocks have
    nothing that the names mean. As in the public code all their layers adapt, except a final one that is called
    ``norm`` and stands beside the blocks (in the ResNet-26 with GroupNorm).

    Args:
        network: The network.
        norms: Its normalisation layers in order.

    Returns:
        The layers in front, in order.
    """
    names = [norm.name for norm in norms]
    blocks = _blocks(network, "", names)
    if len(blocks) >= _FEWEST:
        last = blocks[-math.ceil(len(blocks) / 4)]
        return list(norms[: next(index for index, name in enumerate(names) if name.startswith(f"{last}."))])
    return list(norms[:-1] if _has_final_norm(names) else norms)


def _has_final_norm(names: Sequence[str]) -> bool:
    """Return whether the last layer is called norm and is a child of the module that holds all layers."""
    if len(names) < 2:
        return False
    parent, _, own = names[-1].rpartition(".")
    return own == "norm" and all(name.startswith(f"{parent}.") for name in names if parent)


def _blocks(module: nn.Module, path: str, names: Sequence[str]) -> list[str]:
    children = [(child, f"{path}.{name}" if path else name) for name, child in module.named_children()]
    holders = [(child, at) for child, at in children if sum(name.startswith(f"{at}.") for name in names) >= 2]
    if len(holders) == 1:
        return _blocks(*holders[0], names)
    return [at for _, at in holders]
