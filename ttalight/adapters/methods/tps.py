"""TPS: class prototypes shifted for each image by one step on the entropy of its views."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.views import EpisodicViewAdapter, check_share, surest_views
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses.entropy import bounded, log_probabilities

__all__ = ["TPS", "first_adam_step", "marginal_entropy_gradient", "shifted_logits"]

#: Numbers of all shifts that are in memory together.
_MOST = 1 << 24


class TPS(EpisodicViewAdapter):
    """Shifts the prototypes of the classes by one optimizer step, for each image by itself, and predicts it with them.

    The prototypes are the rows of the classifier, as unit vectors. The loss is that of test-time prompt tuning: the
    entropy of the mean prediction over the views that are surest. Its gradient goes no further than to the prototypes,
    and it is computed in closed form for all images of a batch at once. No weight of the network moves, and every image
    begins with the prototypes of the source. ``views`` forwards a batch.

    Source: E. Sui, X. Wang, S. Yeung-Levy, *Just Shift It: Test-Time Prototype Shifting for Zero-Shot Generalization
    with Vision-Language Models*, WACV 2025, arXiv 2403.12952, after the authors' code, with a shift for each class and
    one step of AdamW. Different from it: numbers are float32 or float64, not float16. Of a classifier whose rows are no
    unit vectors, the directions are shifted and the lengths stay.

    Args:
        lr: Learning rate of the step.
        share: Share of the views in the loss, in (0, 1].
        kwargs: See ``ViewAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("compares predictions of random crops", "views")
    prediction = "after"

    def __init__(self, lr: float = 5e-3, share: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= lr < math.inf:
            raise InputError(f"lr must be at least 0 and finite, got {lr}")
        check_share(share)
        self.lr, self.share = lr, share

    def merge(self, net: AdaptiveNetwork, logits: Tensor, features: Tensor) -> Tensor:
        """Return the logits of the images with their shifted prototypes, (B, C)."""
        weight, _, scale = net.head
        kept, read = surest_views(logits, self.share, scale * features)
        own, images = scale * features[:, 0], max(1, _MOST // weight.numel())
        parts = [slice(first, first + images) for first in range(0, len(logits), images)]
        return torch.cat(
            [shifted_logits(logits[part, 0], own[part], kept[part], read[part], weight, self.lr) for part in parts]
        )

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"optimizer": "AdamW", "lr": self.lr, "share": self.share}


def shifted_logits(
    logits: Tensor, features: Tensor, view_logits: Tensor, view_features: Tensor, weight: Tensor, lr: float
) -> Tensor:
    """Return the logits of images after a step on the prototypes of each, (B, C).

    Args:
        logits: Of the images, (B, C).
        features: Of the images, times the scale of the classifier, (B, D).
        view_logits: Of the views in the loss, (B, K, C).
        view_features: Of these, times the scale of the classifier, (B, K, D).
        weight: Of the classifier, (C, D).
        lr: Learning rate.
    """
    units, lengths = F.normalize(weight, dim=1), torch.linalg.vector_norm(weight, dim=1)
    slopes = marginal_entropy_gradient(view_logits).to(weight.dtype) * lengths
    gradients = slopes.transpose(1, 2) @ view_features
    gradients -= (gradients * units).sum(2, keepdim=True) * units  # the length of a prototype stays
    moves = F.normalize(units + first_adam_step(gradients, lr), dim=2) - units
    change = lengths * (moves @ features[:, :, None])[:, :, 0]
    moved: Tensor = logits + change.to(logits.dtype)
    return moved


def marginal_entropy_gradient(logits: Tensor) -> Tensor:
    """Return the gradient of the entropy of the mean prediction with respect to the logits of the views, (B, K, C).

    Args:
        logits: (B, K, C).
    """
    log_p = log_probabilities(logits, dim=2)
    p, surprise = log_p.exp(), -bounded(log_p.logsumexp(1, keepdim=True) - math.log(logits.shape[1]))
    return p * (surprise - (p * surprise).sum(2, keepdim=True)) / logits.shape[1]


def first_adam_step(gradient: Tensor, lr: float, epsilon: float = 1e-8) -> Tensor:
    """Return the first step of Adam, and of AdamW on zeros."""
    step: Tensor = -lr * gradient / (gradient.abs() + epsilon)
    return step
