"""ECALP: labels that spread from the texts over a graph of the images seen so far, the network frozen."""

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

__all__ = ["ECALP", "channel_weights", "propagated_labels"]

#: Added to the roots of degrees, as in the authors' code.
_SMALL = 1e-6


class ECALP(FeatureAdapter):
    """Predicts an image by label propagation on a graph of texts and images, which grows with the stream.

    Each image is linked with its nearest texts, by cosine, and with its nearest images, by a cosine that weighs each
    dimension by its variance over the texts. Labels start from the texts and spread along the links for a few
    iterations. From one image to the next a share of the surest label of each image is kept. Images are inserted and
    predicted one after another, as in the authors' code, so how a stream is cut into batches changes nothing.

    One forward a batch. An image costs ``iterations`` products of (M, M) with (M, C), with M for ``memory``. Memory for
    M features and M x M numbers.

    Source: Y. Li, Y. Su, A. Goodge, K. Jia, X. Xu, *Efficient and Context-Aware Label Propagation for Zero-/Few-Shot
    Training-Free Adaptation of Vision-Language Model*, ICLR 2025, arXiv 2412.18303, after the authors' code without
    labelled images. Different from it: the graph has the last ``memory`` images, where the code keeps all. The newest
    image is one node of the graph, where the code has it twice. Links with a negative cosine have weight 0, where the
    code takes a power of it. Of two images the older one is weighted, as there. Any network with a linear classifier
    can be adapted; ``scale`` is made for the cosines of CLIP.

    Args:
        memory: Number M of images in the graph. The oldest is replaced.
        text_neighbors: Texts that an image is linked with.
        image_neighbors: Images that an image is linked with, itself among them.
        sharpness: Power of the cosines that is the weight of a link.
        iterations: Steps of the propagation for each image.
        mixing: Share of the neighbours' labels in each step, in [0, 1]; the rest is the label kept.
        kept: Share of the surest label that is kept for the next image, in [0, 1].
        scale: Factor on the propagated labels, which are the logits.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("links images by their features", "a graph")

    def __init__(
        self,
        memory: int = 1000,
        text_neighbors: int = 3,
        image_neighbors: int = 8,
        sharpness: float = 10.0,
        iterations: int = 3,
        mixing: float = 1.0,
        kept: float = 0.2,
        scale: float = 10_000.0,
        norm: Literal["source", "batch"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        counts = {
            "memory": memory, "text_neighbors": text_neighbors, "image_neighbors": image_neighbors,
            "iterations": iterations,
        }  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        for name, value in (("sharpness", sharpness), ("scale", scale)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be positive and finite, got {value}")
        for name, value in (("mixing", mixing), ("kept", kept)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {value}")
        self.memory, self.text_neighbors, self.image_neighbors = memory, text_neighbors, image_neighbors
        self.sharpness, self.iterations, self.mixing = sharpness, iterations, mixing
        self.kept, self.scale = kept, scale

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with a graph without images."""
        super().configure(net)
        weight, size = net.head.weight, self.memory
        self._texts = F.normalize(weight, dim=1) * net.possible_classes[:, None]
        self._channels = channel_weights(self._texts[net.possible_classes])
        links = min(self.text_neighbors, len(weight))
        self._graph = {
            "features": weight.new_zeros(size, weight.shape[1]),  # weighted by channels, and of length one again
            "similarities": weight.new_zeros(size, size),
            "texts": torch.zeros(size, links, dtype=torch.int64, device=weight.device),
            "text_weights": weight.new_zeros(size, links),
            "labels": torch.zeros(size, dtype=torch.int64, device=weight.device),
            "confidences": weight.new_zeros(size),
            "seen": torch.zeros((), dtype=torch.int64, device=weight.device),
        }

    def method_state(self) -> dict[str, Tensor]:
        """Return features, links and labels of the images in the graph, and the number of images so far."""
        return self._graph

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Insert and predict each image of the batch."""
        logits, features = self.read_units(net, images)
        scores = torch.stack([self._insert(feature) for feature in features])
        return self._logits(scores, logits)

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict each image of the batch as if it were the next one."""
        logits, features = self.read_units(net, images)
        before = {name: value.clone() for name, value in self._graph.items()}
        scores = []
        for feature in features:
            scores.append(self._insert(feature))
            for name, value in before.items():
                self._graph[name].copy_(value)
        return self._logits(torch.stack(scores), logits)

    def _logits(self, scores: Tensor, logits: Tensor) -> Tensor:
        return (self.scale * scores).to(logits.dtype).masked_fill(is_masked(logits), -torch.inf)

    def _insert(self, feature: Tensor) -> Tensor:
        """Insert an image, (D,), in place of the oldest, propagate, and return its label, (C,)."""
        state = self._graph
        slot = (state["seen"] % self.memory)[None]
        weighted = F.normalize(feature * self._channels, dim=0)
        state["features"].index_copy_(0, slot, weighted[None])
        row = (state["features"] @ feature).clamp_min(0)[None]
        state["similarities"].index_copy_(0, slot, row).index_copy_(1, slot, row.T)
        cosines, texts = (self._texts @ feature).topk(state["texts"].shape[1])
        state["texts"].index_copy_(0, slot, texts[None])
        state["text_weights"].index_copy_(0, slot, cosines.clamp_min(0).pow(self.sharpness)[None])
        state["confidences"].index_fill_(0, slot, 0)
        state["seen"] += 1
        labels = self._propagate()
        confidences, classes = labels.max(1)
        state["labels"].copy_(classes)
        state["confidences"].copy_(self.kept * confidences)
        return labels.index_select(0, slot)[0]

    def _propagate(self) -> Tensor:
        """Return the labels of all images in the graph, (M, C)."""
        state, classes = self._graph, (self.memory, len(self._texts))
        similarities, nearest = state["similarities"].topk(min(self.image_neighbors, self.memory), dim=1)
        images = torch.zeros_like(state["similarities"]).scatter_(1, nearest, similarities.pow(self.sharpness))
        texts = similarities.new_zeros(classes).scatter_(1, state["texts"], state["text_weights"])
        kept = similarities.new_zeros(classes).scatter_(1, state["labels"][:, None], state["confidences"][:, None])
        return propagated_labels(images, texts, kept, self.mixing, self.iterations)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("ECALP predicts by a graph behind the network, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = (
            "memory", "text_neighbors", "image_neighbors", "sharpness", "iterations", "mixing", "kept", "scale",
        )  # fmt: skip
        return super().protocol() | {name: getattr(self, name) for name in names}


def channel_weights(texts: Tensor) -> Tensor:
    """Return the variance of each dimension over the texts, (C, D), scaled to a vector of length one, (D,)."""
    return F.normalize(texts.var(0, correction=0), dim=0)


def propagated_labels(images: Tensor, texts: Tensor, labels: Tensor, mixing: float, iterations: int) -> Tensor:
    """Return labels of images, (N, C), that spread along links, where the label of each text stays its class.

    Links go both ways. Their weights are divided by the roots of the degrees of both ends.

    Args:
        images: Weights of the links from images to images, (N, N).
        texts: Weights of the links from images to texts, (N, C).
        labels: Labels of the images at the beginning, (N, C).
        mixing: Share of the neighbours' labels in each step; the rest is the label at the beginning.
        iterations: Number of steps.
    """
    links = images + images.T
    scale = 1 / ((links.sum(1) + texts.sum(1)).sqrt() + _SMALL)
    text_scale = 1 / (texts.sum(0).sqrt() + _SMALL)
    links = scale[:, None] * links * scale
    arriving = scale[:, None] * texts * text_scale
    spread = labels
    for _ in range(iterations):
        spread = mixing * (links @ spread + arriving) + (1 - mixing) * labels
    return spread
