"""SHOT: information maximisation of the features behind a frozen classifier."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ttalight.adapters.self_training import SelfTrainingAdapter, per_image
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import entropy, marginal_entropy
from ttalight.losses.entropy import log_probabilities
from ttalight.models.network import Outputs, Selection

__all__ = ["SHOT", "confident_cross_entropy", "information_maximization"]


class SHOT(SelfTrainingAdapter):
    """Makes predictions certain one by one and diverse as a batch, over everything but the classifier.

    The loss is the mean entropy, minus the entropy of the mean prediction, plus a cross-entropy to the labels of the
    predictions that are sure enough. One forward and one backward a batch.

    Source: J. Liang, D. Hu, J. Feng, *Do We Really Need to Access the Source Data? Source Hypothesis Transfer for
    Unsupervised Domain Adaptation*, ICML 2020, arXiv 2002.08546, in the online form of H. Zhao et al., *On Pitfalls of
    Test-Time Adaptation*, ICML 2023, arXiv 2306.03536: labels come from the confidence of the batch's own predictions,
    not from class centroids of the whole target set. The optimizer is the benchmark's: SGD with Nesterov momentum 0.9.
    It tunes the learning rate for each data set; the default is the largest of its grid. Two differences to its code.
    Where no prediction is sure, that term is 0 (there it is NaN). The logarithm of the mean prediction has no offset of
    1e-5, so that a class which no image is predicted as counts by its true entropy.

    Args:
        pseudo_weight: Factor of the cross-entropy, at least 0.
        confidence: Predictions with a probability above this have a label, in [0, 1).
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    shards_batches = True

    published_parameters: Selection = "features"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "SGD", "momentum": 0.9, "nesterov": True, "lr": 1e-3, "batch_size": 64}
    }

    def __init__(self, pseudo_weight: float = 0.3, confidence: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if pseudo_weight < 0:
            raise InputError(f"pseudo_weight must be at least 0, got {pseudo_weight}")
        if not 0 <= confidence < 1:
            raise InputError(f"confidence must lie in [0, 1), got {confidence}")
        self.pseudo_weight = pseudo_weight
        self.confidence = confidence

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return losses whose mean is that of SHOT; the diversity of the batch is in each of them."""
        labelled = confident_cross_entropy(outputs.logits, self.confidence)
        return information_maximization(outputs.logits) + self.pseudo_weight * labelled

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {"pseudo_weight": self.pseudo_weight, "confidence": self.confidence}


def information_maximization(logits: Tensor) -> Tensor:
    """Return the entropy of each image minus that of the batch's mean prediction, (B,).

    Args:
        logits: (B, C) or (B, C, ...); the mean prediction is over images and places.
    """
    everywhere = logits.movedim(1, -1).flatten(0, -2)
    return per_image(entropy(logits)) - marginal_entropy(everywhere)


def confident_cross_entropy(logits: Tensor, confidence: float) -> Tensor:
    """Return losses, (B,), whose mean is the mean cross-entropy of the sure predictions to their own labels.

    Zero where no prediction of the batch is sure.

    Args:
        logits: (B, C) or (B, C, ...); each place counts as a prediction.
        confidence: Predictions with a probability above this are sure.
    """
    likely = log_probabilities(logits).amax(1).reshape(len(logits), -1)
    sure = likely.detach().exp() > confidence
    return -torch.where(sure, likely, 0.0).sum(1) * (len(logits) / sure.sum(dtype=likely.dtype).clamp(min=1))
