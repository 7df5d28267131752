"""TDA: logits corrected by two caches of confident and of uncertain features, the network frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttalight.adapters.components.class_cache import ClassCache
from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import entropy

__all__ = ["TDA"]


class TDA(FeatureAdapter):
    """Adds to the logits how similar an image is to confident images of each class, and subtracts the same of others.

    The positive cache keeps the features of lowest entropy of each predicted class. The negative one keeps features of
    medium entropy, with the classes whose probability lies in a range: they are what such an image probably is not.
    Each image is inserted into the caches and then predicted, one after another, so how a stream is cut into batches
    changes nothing; a batch is computed at once all the same. One forward a batch. Memory for C x 5 features, and for
    C x C x 2 booleans.

    Source: A. Karmanov, D. Guan, S. Lu, A. El Saddik, E. Xing, *Efficient Test-Time Adaptation of Vision-Language
    Models*, CVPR 2024, arXiv 2403.18293, after the authors' code. There entropies are in nats and divided by log2 C,
    which the range of entropies is meant for. Different from it: an image is one view, and not the mean of the surest
    of 64 as for ImageNet's variants there, and numbers are float32 or float64. Any network with a linear classifier
    can be adapted; weights and sharpness are made for logits that are cosines times 100.

    Args:
        positive_size: Features of a class in the positive cache.
        positive_weight: Weight of its similarities.
        positive_sharpness: How fast they fall with the distance: exp(-sharpness (1 - cosine)).
        negative_size: Features of a class in the negative cache.
        negative_weight: Weight of its similarities.
        negative_sharpness: As ``positive_sharpness``.
        entropy_range: Entropies, over log2 C, that an image of the negative cache lies between.
        probability_range: Probabilities that a class it speaks against lies between.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("keeps features of images", "a cache")
    prediction = "after"

    def __init__(
        self,
        positive_size: int = 3,
        positive_weight: float = 2.0,
        positive_sharpness: float = 5.0,
        negative_size: int = 2,
        negative_weight: float = 0.117,
        negative_sharpness: float = 1.0,
        entropy_range: Sequence[float] = (0.2, 0.5),
        probability_range: Sequence[float] = (0.03, 1.0),
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        for name, size in (("positive_size", positive_size), ("negative_size", negative_size)):
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        numbers = {
            "positive_weight": positive_weight, "positive_sharpness": positive_sharpness,
            "negative_weight": negative_weight, "negative_sharpness": negative_sharpness,
        }  # fmt: skip
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        for name, pair in (("entropy_range", entropy_range), ("probability_range", probability_range)):
            if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
                raise InputError(f"{name} must be two numbers, 0 <= lower < upper, got {list(pair)}")
        self.positive_size, self.negative_size = positive_size, negative_size
        self.positive_weight, self.negative_weight = positive_weight, negative_weight
        self.positive_sharpness, self.negative_sharpness = positive_sharpness, negative_sharpness
        self.entropy_range, self.probability_range = tuple(entropy_range), tuple(probability_range)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with empty caches."""
        super().configure(net)
        weight = net.head.weight
        self._positive = ClassCache(weight, self.positive_size)
        self._negative = ClassCache(weight, self.negative_size, marked=True)
        self._span = math.log2(int(net.possible_classes.sum()))

    def method_state(self) -> dict[str, Tensor]:
        """Return both caches."""
        caches = {"positive": self._positive, "negative": self._negative}
        return {f"{name}.{part}": value for name, cache in caches.items() for part, value in cache.state.items()}

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Insert and predict each image of the batch."""
        logits, features = self.read_units(net, images)
        entropies = entropy(logits)
        positive = self._positive.follow(features, logits.argmax(1), entropies, self.positive_sharpness)
        return self._fuse(logits, positive, self._follow_uncertain(logits, features, entropies))

    def _follow_uncertain(self, logits: Tensor, features: Tensor, entropies: Tensor) -> Tensor:
        """Insert images into the negative cache, and return what each reads from it, (B, C)."""
        share, (lower, upper) = entropies / self._span, self.entropy_range
        uncertain = entropies.masked_fill(~((share > lower) & (share < upper)), torch.inf)
        probabilities, (lower, upper) = logits.softmax(1), self.probability_range
        marks = (probabilities > lower) & (probabilities < upper)
        return self._negative.follow(features, logits.argmax(1), uncertain, self.negative_sharpness, marks)

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the present caches. While they are empty, the network's logits are the prediction."""
        logits, features = self.read_units(net, images)
        positive = self._positive.read(features, self.positive_sharpness)
        return self._fuse(logits, positive, self._negative.read(features, self.negative_sharpness))

    def _fuse(self, logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return logits + self.positive_weight * positive - self.negative_weight * negative

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        name = type(self).__name__
        raise InputTypeError(f"{name} corrects logits by caches behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = (
            "positive_size", "positive_weight", "positive_sharpness", "negative_size", "negative_weight",
            "negative_sharpness",
        )  # fmt: skip
        ranges = {name: list(getattr(self, name)) for name in ("entropy_range", "probability_range")}
        return super().protocol() | {name: getattr(self, name) for name in names} | ranges
