"""The modules that a network is made of."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["all_modules"]


def all_modules(network: nn.Module) -> Iterator[nn.Module]:
    """Return an iterator over a network and the modules in it, as ``network.modules()``.

    It works for networks with an attribute named ``modules``, such as a list of layers, which hides the method.

    Args:
        network: Any module.
    """
    return nn.Module.modules(network)
