"""The base of the methods that change predictions by features, and no weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Network

__all__ = ["FeatureAdapter"]


class FeatureAdapter(Adapter):
    """Reads logits and features of a frozen network with a linear classifier.

    Args:
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If ``norm`` is another word; at the first batch, if the classifier cannot be found.
    """

    #: What the method does with images, and without what a network that predicts pixels can be adapted, for an error.
    images_are_for: ClassVar[tuple[str, str]] = ("reads features of images", "features")

    def __init__(self, norm: Literal["source", "batch"] = "source", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if norm not in ("source", "batch"):
            raise InputError(f"norm must be 'source' or 'batch', got {norm!r}")
        self.norm = norm

    def check(self, net: Network) -> None:
        """Check that there can be a classifier, and layers whose statistics can be chosen."""
        net.classifier.check()
        for layer in net.norms if self.norm == "batch" else ():
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Choose the statistics, and find the classifier."""
        net.set_norm_mode("batch" if self.norm == "batch" else "source")
        _ = net.head

    @torch.no_grad()
    def read(self, net: AdaptiveNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, C), and features, (B, D), of a batch, in one pass."""
        outputs = net(images)
        check_image_predictions(outputs.logits, type(self).__name__, *self.images_are_for)
        return outputs.logits, outputs.vectors

    def read_units(self, net: AdaptiveNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, C), and unit vectors along the features, (B, D), in the type of the classifier."""
        logits, features = self.read(net, images)
        return logits, F.normalize(features, dim=1).to(net.head.weight.dtype)
