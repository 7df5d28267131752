"""OnZeta: labels of a balanced stream, and class proxies among image features, both learned online."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import is_masked

__all__ = ["OnZeta", "followed_duals", "followed_proxies"]


class OnZeta(FeatureAdapter):
    """Mixes two predictions that are learned online: the text's with balanced classes, and one by proxies of classes.

    The first is the network's prediction with an offset for each class, which grows as long as the class is predicted
    less often than its share. The second compares the image with a proxy for each class, a unit vector that begins as
    the class's row of the classifier and learns the first prediction by gradient descent in closed form. The share of
    the second grows along the stream. Images are predicted and learned from one after another, so how a stream is cut
    into batches changes nothing. Returns log-probabilities. One forward a batch, and a step on (C, D) numbers an image.

    Source: Q. Qian, J. Hu, *Online Zero-Shot Classification with CLIP*, ECCV 2024, arXiv 2408.13320, after the
    authors' code. Different from it: the temperature of the text is that of the network's logits, 0.01 for a scale of
    100 as there. The number of images is not known in advance, so ``images`` names it, and the shares stay constant
    behind it. Offsets are added to logits, and not multiplied as exponentials, which overflow for few classes.

    Args:
        images: Number of images after which the second prediction has its full share.
        share: Full share of the second prediction, in [0, 1].
        temperature: Temperature of the second prediction.
        proxy_rate: Learning rate of the proxies, over the root of the number of images so far.
        offset_rate: Learning rate of the offsets, likewise.
        balance: Share of images, in units of 1 / C, that each class gets at least, in [0, 1].
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("compares features of images with proxies", "proxies")

    def __init__(
        self,
        images: int = 10_000,
        share: float = 0.8,
        temperature: float = 0.04,
        proxy_rate: float = 0.5,
        offset_rate: float = 20.0,
        balance: float = 1.0,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        if images < 1:
            raise InputError(f"images must be at least 1, got {images}")
        for name, value in (("share", share), ("balance", balance)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {value}")
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be positive and finite, got {temperature}")
        for name, value in (("proxy_rate", proxy_rate), ("offset_rate", offset_rate)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        self.images, self.share, self.temperature = images, share, temperature
        self.proxy_rate, self.offset_rate, self.balance = proxy_rate, offset_rate, balance

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with the rows of the classifier as proxies, and without offsets."""
        super().configure(net)
        weight = net.head.weight
        self._possible = net.possible_classes
        self._proxies = F.normalize(weight, dim=1) * self._possible[:, None]
        self._duals = weight.new_zeros(len(weight))
        self._seen = torch.zeros((), dtype=torch.int64, device=weight.device)

    def method_state(self) -> dict[str, Tensor]:
        """Return proxies, offsets and the number of images so far."""
        return {"proxies": self._proxies, "duals": self._duals, "seen": self._seen}

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict each image, then learn from it."""
        logits, features = self.read_units(net, images)
        predicted = []
        for number in range(len(logits)):
            image = slice(number, number + 1)
            by_text, by_proxies = self._predictions(logits[image], features[image])
            predicted.append(self._mix(by_text, by_proxies))
            self._follow(features[number], by_text[0].exp(), by_proxies[0].exp())
        return torch.cat(predicted).to(logits.dtype)

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict each image of the batch as if it were the next one."""
        logits, features = self.read_units(net, images)
        return self._mix(*self._predictions(logits, features)).to(logits.dtype)

    def _predictions(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities by the text and by the proxies, (B, C) each."""
        masked = is_masked(logits)
        by_text = (logits.to(features.dtype) + self._duals).masked_fill(masked, -torch.inf)
        by_proxies = (features @ self._proxies.T / self.temperature).masked_fill(masked, -torch.inf)
        return by_text.log_softmax(1), by_proxies.log_softmax(1)

    def _mix(self, by_text: Tensor, by_proxies: Tensor) -> Tensor:
        progress = ((self._seen + 1).to(by_text.dtype) / self.images).clamp(max=1).sqrt()
        share = self.share * progress
        return torch.logaddexp(by_text + (1 - share).log(), by_proxies + share.log())

    def _follow(self, feature: Tensor, by_text: Tensor, by_proxies: Tensor) -> None:
        self._seen += 1
        root = self._seen.to(feature.dtype).sqrt()
        possible = self._possible.to(feature.dtype)
        fair = self.balance * possible / possible.sum()
        self._duals.copy_(followed_duals(self._duals, by_text, fair, self.offset_rate / root))
        rate = self.proxy_rate / (self.temperature * root)
        self._proxies.copy_(followed_proxies(self._proxies, feature, by_proxies - by_text, rate))

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("OnZeta mixes two predictions behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("images", "share", "temperature", "proxy_rate", "offset_rate", "balance")
        return super().protocol() | {name: getattr(self, name) for name in names}


def followed_duals(duals: Tensor, probabilities: Tensor, fair: Tensor, rate: Tensor | float) -> Tensor:
    """Return offsets of the classes after an image, (C,): they grow where a class gets less than its share.

    Args:
        duals: (C,), at least 0.
        probabilities: Of the image, (C,).
        fair: Share of each class, (C,).
        rate: Learning rate.
    """
    return (duals - rate * (probabilities - fair)).clamp_min(0)


def followed_proxies(proxies: Tensor, feature: Tensor, residuals: Tensor, rate: Tensor | float) -> Tensor:
    """Return proxies after one step on the cross-entropy of an image, of length one again, (C, D).

    Args:
        proxies: Unit vectors, (C, D).
        feature: Unit vector, (D,).
        residuals: Predicted minus target probabilities, (C,).
        rate: Learning rate, over the temperature.
    """
    return F.normalize(proxies - rate * torch.outer(residuals, feature), dim=1)
