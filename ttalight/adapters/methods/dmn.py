"""DMN: a classifier for each image, made of the features of each class that are most like it, the network frozen."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.class_cache import ClassCache
from ttalight.adapters.feature import FeatureAdapter, cosine_scale
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import entropy, is_masked

__all__ = ["DMN", "class_vectors"]

#: Images that are computed together, which bounds the memory of a large batch and changes nothing else.
_TOGETHER = 32


class DMN(FeatureAdapter):
    """Adds the probabilities of a second classifier, which a memory of confident images makes for each image.

    The memory keeps the features of lowest entropy of each predicted class, beside the row of the classifier. The
    vector of a class is the mean of these, weighed by how similar each is to the image. The second classifier compares
    the image with these vectors. Each image is inserted into the memory and then predicted, one after another, so how
    a stream is cut into batches changes nothing. Returns log-probabilities. One forward a batch, and two products of
    (B, D) with C (M + 1) features, M for ``size``. Memory for C M features.

    Source: Y. Zhang, W. Zhu, H. Tang, Z. Ma, K. Zhou, L. Zhang, *Dual Memory Networks: A Versatile Adaptation Approach
    for Vision-Language Models*, CVPR 2024, arXiv 2403.17589, after the authors' code: the dynamic memory without
    training, which is their method for no labelled images. Different from it: an image is one view, and not the mean of
    the surest of 32. The weight is fixed, where the code searches the best one by the labels of the test set; 1 is that
    of the comparison by C. Fuchs et al., arXiv 2501.04352. Any network with a linear classifier can be adapted;
    ``sharpness`` and ``scale`` are made for CLIP's features.

    Args:
        size: Features M of a class in the memory.
        sharpness: How fast the weight of a feature falls with its distance: exp(-sharpness (1 - cosine)).
        weight: Weight of the second probabilities, where that of the first is 1.
        scale: Factor on the cosines of the second classifier; by default that of the first, 100 for one without.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("keeps features of images", "a memory")
    prediction = "after"

    def __init__(
        self,
        size: int = 50,
        sharpness: float = 5.5,
        weight: float = 1.0,
        scale: float | None = None,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        if size < 1:
            raise InputError(f"size must be at least 1, got {size}")
        if not 0 <= sharpness < math.inf:
            raise InputError(f"sharpness must be at least 0 and finite, got {sharpness}")
        for name, value in (("weight", weight), ("scale", scale)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be positive and finite, got {value}")
        self.size, self.sharpness, self.weight, self.scale = size, sharpness, weight, scale

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with an empty memory."""
        super().configure(net)
        self._texts, self._scale = F.normalize(net.head.weight, dim=1), cosine_scale(net, self.scale)
        self._cache = ClassCache(net.head.weight, self.size)

    def method_state(self) -> dict[str, Tensor]:
        """Return the memory."""
        return self._cache.state

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Insert and predict each image of the batch."""
        logits, features = self.read_units(net, images)
        parts = (torch.split(each, _TOGETHER) for each in (features, logits.argmax(1), entropy(logits)))
        return self._mix(logits, torch.cat([self._follow(*part) for part in zip(*parts, strict=True)]))

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the present memory. While it is empty, the probabilities are those of the network."""
        logits, features = self.read_units(net, images)
        present = self._cache.entropies < torch.inf
        parts = [self._compare(part, self._vectors(part, present)) for part in torch.split(features, _TOGETHER)]
        return self._mix(logits, torch.cat(parts))

    def _follow(self, features: Tensor, classes: Tensor, entropies: Tensor) -> Tensor:
        """Insert images one after another, and return the logits that each one has from then on, (B, C)."""
        places = self._cache.places(classes, entropies)
        kept, new = torch.split(places < self.size, [len(self._texts) * self.size, len(features)], dim=1)
        vectors = self._vectors(features, kept.view(-1, len(self._texts), self.size))
        weights = (self.sharpness * (features @ features.T - 1)).exp() * new
        vectors.index_add_(0, classes, weights.T[:, :, None] * features[:, None])
        self._cache.insert(places[-1], classes, features, entropies)
        return self._compare(features, vectors)

    def _vectors(self, features: Tensor, present: Tensor) -> Tensor:
        """Return the sums of the rows of the classifier and of what is present in the memory, (C, B, D)."""
        texts = class_vectors(features, self._texts[:, None], torch.ones_like(present[..., :1]), self.sharpness)
        return texts + class_vectors(features, self._cache.features, present, self.sharpness)

    def _compare(self, features: Tensor, vectors: Tensor) -> Tensor:
        return self._scale * torch.einsum("cbd,bd->bc", F.normalize(vectors, dim=2), features)

    def _mix(self, logits: Tensor, by_memory: Tensor) -> Tensor:
        masked = is_masked(logits)
        first, second = (each.masked_fill(masked, -torch.inf).log_softmax(1) for each in (logits, by_memory))
        mixed = torch.logaddexp(first.to(second.dtype), second + math.log(self.weight))
        return (mixed - math.log1p(self.weight)).to(logits.dtype)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("DMN compares images with a memory behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {name: getattr(self, name) for name in ("size", "sharpness", "weight", "scale")}


def class_vectors(features: Tensor, cached: Tensor, present: Tensor, sharpness: float) -> Tensor:
    """Return the sums of cached features of each class, weighed by their similarities with each image, (C, B, D).

    Args:
        features: Unit vectors, (B, D).
        cached: Unit vectors, (C, M, D).
        present: Which of these count, boolean (C, M), or (B, C, M) for each image.
        sharpness: Of the similarity, exp(-sharpness (1 - cosine)).
    """
    cosines = (features @ cached.flatten(0, 1).T).view(len(features), *cached.shape[:2])
    weights = (sharpness * (cosines - 1)).exp() * present
    return weights.transpose(0, 1) @ cached
