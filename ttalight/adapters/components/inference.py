"""Parts of methods that change predictions and no weights."""

from __future__ import annotations

from ttalight.models.network import Network

__all__ = ["check_inference"]


def check_inference(net: Network, norm: str) -> None:
    """Check that a network can have a classifier, and that statistics of the batch can be chosen where they are wanted.

    Args:
        net: The network.
        norm: ``source`` or ``batch``.

    Raises:
        ValueError: If there is no layer that can be the classifier.
        TypeError: If the statistics of a layer cannot be chosen.
    """
    net.classifier.check()
    for layer in net.norms if norm == "batch" else ():
        layer.check()
