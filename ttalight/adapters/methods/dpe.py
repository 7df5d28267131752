"""DPE: prototypes of classes among texts and among images, both of which follow the stream."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.class_cache import ClassCache
from ttalight.adapters.methods.tps import first_adam_step
from ttalight.adapters.views import ViewAdapter, check_share, surest_views
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import entropy
from ttalight.losses.self_training import marginal_entropy

__all__ = ["DPE", "Prototypes", "cache_logits", "prototype_loss"]

#: Temperature of the alignment, and the constant of Adam's denominator.
_TEMPERATURE, _EPSILON = 0.01, 1e-3


class DPE(ViewAdapter):
    """Predicts by prototypes of the texts and of the images of each class, which one step moves for each image.

    The prototypes of the images are means over a cache of features of lowest entropy, as that of ``TDA``. The step
    makes the prediction for the surest views surer, and aligns both prototypes of a class. It is discarded after the
    image, but where the prediction has become sure, the prototypes of the texts follow it by a running mean. Images are
    taken one after another, so how a stream is cut into batches changes nothing but the random views. No weight of the
    network moves. ``views`` forwards a batch, and a gradient of (C, D) numbers an image.

    Source: C. Zhang, S. Stepputtis, K. Sycara, Y. Xie, *Dual Prototype Evolving for Test-Time Generalization of
    Vision-Language Models*, NeurIPS 2024, arXiv 2410.12790, after the authors' code, with AdamW's first step. There
    entropies are in nats and divided by log2 C, which the threshold is meant for. Different from it: numbers are
    float32 or float64, not float16. Of a classifier whose rows are no unit vectors, directions follow the stream and
    lengths stay.

    Args:
        cache_size: Features of a class in the cache.
        cache_weight: Weight of the similarities to the prototypes of the images.
        cache_sharpness: How fast they fall with the distance: exp(-sharpness (1 - cosine)).
        lr: Learning rate of the step.
        alignment: Weight of the alignment in the loss.
        threshold: Entropy, over log2 C, below which the prototypes of the texts follow an image.
        share: Share of the views in the loss, those of lowest entropy, in (0, 1].
        views: Views of an image, as in ``ViewAdapter``. 1 is the image alone, as for fine-grained sets.
        augmix: As in ``ViewAdapter``.
        kwargs: See ``ViewAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("keeps features of images", "a cache")
    prediction = "after"
    least_views = 1

    def __init__(
        self,
        cache_size: int = 3,
        cache_weight: float = 6.0,
        cache_sharpness: float = 5.0,
        lr: float = 6e-4,
        alignment: float = 0.5,
        threshold: float = 0.1,
        share: float = 0.1,
        views: int = 64,
        augmix: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(views=views, augmix=augmix, **kwargs)
        if cache_size < 1:
            raise InputError(f"cache_size must be at least 1, got {cache_size}")
        numbers = {
            "cache_weight": cache_weight, "cache_sharpness": cache_sharpness, "lr": lr, "alignment": alignment,
            "threshold": threshold,
        }  # fmt: skip
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        check_share(share)
        self.cache_size, self.cache_weight, self.cache_sharpness = cache_size, cache_weight, cache_sharpness
        self.lr, self.alignment, self.threshold, self.share = lr, alignment, threshold, share

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with the rows of the classifier, and with an empty cache."""
        super().configure(net)
        weight = net.head.weight
        self._source, self._lengths = F.normalize(weight, dim=1), torch.linalg.vector_norm(weight, dim=1)
        self._texts, self._followed = self._source.clone(), weight.new_zeros(())
        self._cache = ClassCache(weight, self.cache_size)
        self._span = math.log2(int(net.possible_classes.sum()))

    def method_state(self) -> dict[str, Tensor]:
        """Return the prototypes of the texts, the number of images that they followed, and the cache."""
        cache = {f"cache.{part}": value for part, value in self._cache.state.items()}
        return {"texts": self._texts, "followed": self._followed} | cache

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Learn from each image, and predict it."""
        return self._images(net, images, learn=True)

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict each image of the batch by a step of its own, from the present prototypes."""
        return self._images(net, images, learn=False)

    def _images(self, net: AdaptiveNetwork, images: Tensor, learn: bool) -> Tensor:
        logits, features = self.read_view_features(net, images)
        scaled = net.head.scale * features
        views = zip(logits, scaled, F.normalize(features, dim=2), strict=True)
        return torch.stack([self._image(*each, learn) for each in views])

    def _image(self, logits: Tensor, scaled: Tensor, units: Tensor, learn: bool) -> Tensor:
        """Return the prediction of one image, (C,), by its views: logits, scaled features and unit vectors."""
        present = logits + self._change(scaled, F.normalize(self._texts, dim=1)).to(logits.dtype)
        kept, *read = surest_views(present[None], self.share, scaled[None], units[None])
        mean, mean_scaled, unit = (each[0].mean(0) for each in (kept, *read))
        if learn:
            self._insert(unit, mean.argmax(), marginal_entropy(kept[0]))
        known = self._cache.entropies[:, 0] < torch.inf
        stepped = self._step(mean, mean_scaled, unit, known)
        change = self._change(scaled[:1], stepped.texts)[0] + self._read(units[0], stepped.images, known)
        predicted = logits[0] + change.to(logits.dtype)
        if learn:
            self._follow(stepped.texts, entropy(predicted[None])[0])
        return predicted

    def _change(self, scaled: Tensor, texts: Tensor) -> Tensor:
        """Return how unit prototypes of the texts other than the source's change logits, (V, C)."""
        change: Tensor = scaled @ (self._lengths[:, None] * (texts - self._source)).T
        return change

    def _images_of_classes(self) -> Tensor:
        """Return the mean of the features of each class in the cache, (C, D); zero where there is none."""
        there = (self._cache.entropies < torch.inf).to(self._texts.dtype)
        return (self._cache.features * there[:, :, None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1)

    def _insert(self, unit: Tensor, label: Tensor, value: Tensor) -> None:
        classes, entropies = label[None], value[None].to(unit.dtype)
        self._cache.insert(self._cache.places(classes, entropies)[-1], classes, unit[None], entropies)

    def _read(self, unit: Tensor, images: Tensor, known: Tensor) -> Tensor:
        return cache_logits(unit, images, known, self.cache_weight, self.cache_sharpness)

    def _step(self, logits: Tensor, scaled: Tensor, unit: Tensor, known: Tensor) -> Prototypes:
        """Return both prototypes after a step on the loss of an image, as unit vectors.

        Args:
            logits: Of the surest views, their mean, (C,).
            scaled: Features of them, their mean, (D,).
            unit: Their unit vectors' mean, (D,).
            known: Classes that the cache has, (C,).
        """
        texts, images = self._texts, self._images_of_classes()
        start = F.normalize(texts, dim=1)
        with torch.enable_grad():
            residuals = [torch.zeros_like(each).requires_grad_() for each in (texts, images)]
            moved = Prototypes(F.normalize(texts + residuals[0], dim=1), F.normalize(images + residuals[1], dim=1))
            change = (self._lengths[:, None] * (moved.texts - start)) @ scaled
            fused = logits + (change + self._read(unit, moved.images, known)).to(logits.dtype)
            gradients = torch.autograd.grad(prototype_loss(fused, moved, known, self.alignment), residuals)
        steps = (first_adam_step(each, self.lr, _EPSILON) for each in gradients)
        return Prototypes(*(F.normalize(b + s, dim=1) for b, s in zip((texts, images), steps, strict=True)))

    def _follow(self, texts: Tensor, value: Tensor) -> None:
        """Let the prototypes of the texts follow those of an image, if its entropy is low."""
        is_sure = (value / self._span < self.threshold).to(texts.dtype)
        self._followed += is_sure
        self._texts += is_sure * (texts - self._texts) / (self._followed + 1)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("DPE predicts by prototypes of each image, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("cache_size", "cache_weight", "cache_sharpness", "lr", "alignment", "threshold", "share")
        own = {name: getattr(self, name) for name in names}
        return super().protocol() | {"optimizer": "AdamW"} | own


class Prototypes(NamedTuple):
    """Prototypes of the classes.

    Args:
        texts: Unit vectors, (C, D).
        images: Unit vectors, (C, D).
    """

    texts: Tensor
    images: Tensor


def cache_logits(unit: Tensor, images: Tensor, known: Tensor, weight: float, sharpness: float) -> Tensor:
    """Return how similar a feature is to prototypes of images, weight exp(-sharpness (1 - cosine)), (C,).

    Args:
        unit: (D,).
        images: Unit vectors, (C, D).
        known: Classes that have a prototype, (C,).
        weight: Factor.
        sharpness: Of the similarity.
    """
    similarities: Tensor = (sharpness * (images @ unit - 1)).exp() * known
    return weight * similarities


def prototype_loss(logits: Tensor, prototypes: Prototypes, known: Tensor, alignment: float) -> Tensor:
    """Return the entropy of a prediction and the alignment of both prototypes of the classes, a scalar.

    The alignment is InfoNCE: the prototype of the images of a class is nearest to that of its text, among the classes
    that have both.

    Args:
        logits: (C,).
        prototypes: Unit vectors.
        known: Classes that have a prototype of images, (C,).
        alignment: Weight of the alignment.
    """
    cosines = prototypes.images @ prototypes.texts.T / _TEMPERATURE
    contrasts = cosines.masked_fill(~known, -1e4).logsumexp(1) - cosines.diagonal()
    mean = torch.where(known, contrasts, 0.0).sum() / known.sum().clamp_min(1)
    return entropy(logits[None])[0] + alignment * mean
