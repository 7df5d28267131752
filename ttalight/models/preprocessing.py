"""Preprocessing of images for a pretrained network, by its own configuration."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Preprocessing", "preprocessing_of"]


class Preprocessing(NamedTuple):
    """Preparation of images for a network.

    Attributes:
        mean: Channel means of the normalisation, RGB in [0, 1].
        std: Its standard deviations.
        size: Side in pixels of what the network sees; None for any size.
        resize: Side in pixels that images are scaled to before their centre is taken; None leaves them as they are.
        interpolation: Filter of that scaling, such as ``bilinear`` or ``bicubic``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None
    resize: int | None
    interpolation: str


def preprocessing_of(network: nn.Module) -> Preprocessing | None:
    """Return what a network's ``pretrained_cfg`` says, or its ``preprocess_cfg``; None if it has neither.

    Scaled side and size are related by the configuration's ``crop_pct``, as in timm's own evaluation. A configuration
    without ``input_size`` is that of a network whose stem was replaced: it takes any size.

    Args:
        network: A network as timm makes it, or an image tower as open_clip makes it.
    """
    config: Any = getattr(network, "pretrained_cfg", None)
    if config is None and isinstance(getattr(network, "preprocess_cfg", None), dict):
        config = dict(network.preprocess_cfg)  # type: ignore[arg-type]
        size = config.pop("size")
        config["input_size"] = tuple(size) if isinstance(size, (list, tuple)) else (size,)
    if config is None or not {"mean", "std"} <= set(config):
        return None
    size = config["input_size"][-1] if config.get("input_size") else None
    resize = None if size is None else math.floor(size / config.get("crop_pct", 1.0))
    interpolation = str(config.get("interpolation", "bilinear"))
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), size, resize, interpolation)
