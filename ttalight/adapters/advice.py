"""Warnings about settings under which a method cannot work as published."""

from __future__ import annotations

import warnings
from typing import Any

from ttalight.engine.adaptive_network import AdaptiveNetwork

__all__ = ["warn_of_defaults", "warn_of_no_step", "warn_of_small_batches"]

#: Smallest batch whose statistics are reliable enough to normalise with.
_FEWEST = 8
#: Classes from which on a classifier is of ImageNet's kind.
_MANY_CLASSES = 200


def warn_of_defaults(method: str, published: dict[str, dict[str, Any]], classes: int) -> None:
    """Warn when settings published for CIFAR meet a classifier of ImageNet's kind.

    Args:
        method: Its name.
        published: Its settings by benchmark.
        classes: Number of classes.
    """
    cifar, imagenet = published.get("cifar"), published.get("imagenet")
    if classes >= _MANY_CLASSES and imagenet != cifar:
        advice = (
            "For ImageNet none are published"
            if imagenet is None
            else f"For ImageNet {method}.preset('imagenet') has the published ones, {imagenet}"
        )
        warnings.warn(f"{method} runs with its settings for CIFAR on {classes} classes. {advice}", stacklevel=2)


def warn_of_small_batches(method: str, net: AdaptiveNetwork, images: int) -> None:
    """Warn when BatchNorm layers normalise with the statistics of a few images.

    Args:
        method: Its name.
        net: The network, configured.
        images: Images of the first batch.
    """
    if images < _FEWEST and any(norm.is_batch_norm and norm.mode in ("batch", "ema") for norm in net.norms):
        warnings.warn(
            f"{method} normalises with the statistics of {images} images a batch, which say little: its predictions "
            f"may be worse than the source's. Use batches of at least {_FEWEST} images, better 64, or AlphaBN, or a "
            "network with GroupNorm or LayerNorm",
            stacklevel=2,
        )


def warn_of_no_step(method: str, net: AdaptiveNetwork) -> None:
    """Warn when no step of a run has updated anything.

    Args:
        method: Its name.
        net: The network.
    """
    counters = net.counters
    if net.optimizer is not None and counters.skipped and not counters.updates:
        warnings.warn(
            f"{method} has made no step in {counters.batches} batches: in all {counters.skipped} steps every sample "
            "was filtered out, or loss or gradient was not finite. Its predictions are those of the source weights",
            stacklevel=2,
        )
