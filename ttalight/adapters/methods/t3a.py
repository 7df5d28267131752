"""T3A: the classifier replaced by prototypes of confident target features."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses.entropy import entropy, is_masked
from ttalight.models.exported_norm import become

__all__ = ["T3A", "insert_supports"]


class T3A(FeatureAdapter):
    """Classifies by the class means of the most confident features seen so far, the network frozen.

    Each class keeps the M features of lowest entropy among those that the source classifier gives to it, beginning with
    the class's own row of the classifier. A batch is inserted first and then predicted: the logits are the products of
    its features with the unit vectors along the sums of each class's normalised supports. One forward a batch; memory
    for C x M features.

    Source: Y. Iwasawa, Y. Matsuo, *Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization*,
    NeurIPS 2021.

    Args:
        supports: Largest number M of features that a class keeps.
        norm: Statistics of BatchNorm layers, ``source`` as the authors' or ``batch``.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("keeps features of images", "supports")
    prediction = "after"

    def __init__(self, supports: int = 100, norm: Literal["source", "batch"] = "source", **kwargs: Any) -> None:
        super().__init__(norm=norm, **kwargs)
        if supports < 1:
            raise InputError(f"supports must be at least 1, got {supports}")
        self.supports = supports

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with the rows of the classifier, those of masked classes left out."""
        super().configure(net)
        weight, bias, scale = net.head
        logits = scale * weight @ weight.T
        logits = logits if bias is None else logits + bias
        classes, width = weight.shape
        self._features = weight.new_zeros(classes, self.supports, width)
        self._entropies = weight.new_full((classes, self.supports), torch.inf)
        possible = net.possible_classes
        logits = logits.masked_fill(~possible, -torch.inf)
        insert_supports(self._features, self._entropies, weight[possible], logits[possible])

    def method_state(self) -> dict[str, Tensor]:
        """Return the supports."""
        return {"features": self._features, "entropies": self._entropies}

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Insert the batch, then predict it."""
        logits, features = self.read(net, images)
        insert_supports(self._features, self._entropies, features.to(self._features.dtype), logits)
        return self._classify(features, logits)

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the present supports."""
        logits, features = self.read(net, images)
        return self._classify(features, logits)

    def _classify(self, features: Tensor, logits: Tensor) -> Tensor:
        return F.linear(features.to(self._features.dtype), self._prototypes()).masked_fill(
            is_masked(logits), -torch.inf
        )

    def _prototypes(self) -> Tensor:
        sums = F.normalize(self._features, dim=2).sum(1)  # empty places are zero
        return F.normalize(sums, dim=1)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Give a copy of the network the prototypes as its classifier; see ``Method.export``.

        Where classes are masked by the classifier itself, it has a bias, minus infinity for these.
        """
        super().export(net, module)
        found, possible = net.classifier.found, net.possible_classes
        assert found is not None, "configure has found the classifier"
        layer: Any = module.get_submodule(found.name)
        become(layer, nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear)
        rows = possible.nonzero()[:, 0] if found.rows is None else found.rows[possible]
        weight = torch.zeros_like(layer.weight.detach())
        weight.flatten(1).index_copy_(0, rows, self._prototypes()[possible].to(weight.dtype))
        masked = found.rows is None and not bool(possible.all())
        bias = weight.new_zeros(len(weight)).masked_fill(~possible, -torch.inf) if masked else None
        layer.weight, layer.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {"supports": self.supports}


@torch.no_grad()
def insert_supports(features: Tensor, entropies: Tensor, new: Tensor, logits: Tensor) -> None:
    """Insert features into the supports of the classes they are predicted to be, in place; no host synchronisation.

    Args:
        features: Supports by class, (C, M, D), zero where empty.
        entropies: Their entropies in ascending order, (C, M), infinite where empty.
        new: Features, (B, D).
        logits: Of the new features, (B, C).
    """
    classes, places, width = features.shape
    owner = torch.cat([torch.arange(classes, device=new.device).repeat_interleave(places), logits.argmax(1)])
    value = torch.cat([entropies.flatten(), entropy(logits).to(entropies.dtype)])
    vectors = torch.cat([features.flatten(0, 1), new])
    order = value.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]  # by class, within a class by entropy
    counts = torch.zeros(classes, dtype=torch.int64, device=new.device).index_add_(0, owner, torch.ones_like(owner))
    rank = torch.arange(len(order), device=new.device) - (counts.cumsum(0) - counts)[owner[order]]
    # What has no place among the M best goes to one place too many, which is cut off.
    place = torch.where(rank < places, owner[order] * places + rank, classes * places)
    kept = features.new_zeros(classes * places + 1, width).index_copy_(0, place, vectors[order])
    scores = entropies.new_full((classes * places + 1,), torch.inf).index_copy_(0, place, value[order])
    features.copy_(kept[:-1].view_as(features))
    entropies.copy_(scores[:-1].view_as(entropies))
