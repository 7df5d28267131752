"""The base of the methods that change predictions by features, and no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.embedding_cache import EmbeddingCache
from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.cosine_classifier import CosineClassifier
from ttalight.models.network import Network

__all__ = ["FeatureAdapter", "cosine_scale"]

#: CLIP's factor on cosines.
_SCALE = 100.0


class FeatureAdapter(Adapter):
    """Reads logits and features of a frozen network with a linear classifier.

    Args:
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        cache: Folder that keeps logits and features of each batch, so that a second method on the same stream makes no
            passes; see ``EmbeddingCache``. By default none.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If ``norm`` is another word; at the first batch, if the classifier cannot be found.
    """

    #: What the method does with images, and without what a network that predicts pixels can be adapted, for an error.
    images_are_for: ClassVar[tuple[str, str]] = ("reads features of images", "features")

    def __init__(self, norm: Literal["source", "batch"] = "source", cache: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if norm not in ("source", "batch"):
            raise InputError(f"norm must be 'source' or 'batch', got {norm!r}")
        self.norm, self.cache = norm, cache

    def check(self, net: Network) -> None:
        """Check that there can be a classifier, and layers whose statistics can be chosen."""
        net.classifier.check()
        for layer in net.norms if self.norm == "batch" else ():
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Choose the statistics, and find the classifier."""
        net.set_norm_mode("batch" if self.norm == "batch" else "source")
        _ = net.head
        self._embeddings = None if self.cache is None else EmbeddingCache(self.cache, net, self.norm)

    @torch.no_grad()
    def read(self, net: AdaptiveNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, C), and features, (B, D), of a batch, in one pass or from the cache."""
        return self.cached(net, images, "images", (len(images),), lambda: self.pass_images(net, images))

    def read_units(self, net: AdaptiveNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, C), and unit vectors along the features, (B, D), in the type of the classifier."""
        logits, features = self.read(net, images)
        return logits, F.normalize(features, dim=1).to(net.head.weight.dtype)

    def pass_images(self, net: AdaptiveNetwork, images: Tensor, batches: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return logits, (B, C), and features, (B, D), in one pass, which counts as so many of a whole batch."""
        outputs = net(images, batches=batches)
        check_image_predictions(outputs.logits, type(self).__name__, *self.images_are_for)
        return outputs.logits, outputs.vectors

    def cached(
        self,
        net: AdaptiveNetwork,
        images: Tensor,
        key: str,
        rows: tuple[int, ...],
        compute: Callable[[], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return logits and features of a batch from the cache, where there is one; see ``EmbeddingCache.fetch``."""
        return compute() if self._embeddings is None else self._embeddings.fetch(net, images, key, rows, compute)


def cosine_scale(net: AdaptiveNetwork, given: float | None) -> float:
    """Return the factor on the cosines in a network's logits.

    Args:
        net: The network, its classifier found.
        given: The factor; None for that of the classifier, or CLIP's 100 where it has none.
    """
    if given is not None:
        return given
    found = net.classifier.found
    return found.scale if found is not None and isinstance(found.module, CosineClassifier) else _SCALE
