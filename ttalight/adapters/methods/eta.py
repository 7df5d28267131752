"""ETA: entropy minimisation on samples that are reliable and not redundant."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ttalight.adapters.components.filters import (
    confidence_weight,
    entropy_margins,
    image_probabilities,
    redundancy,
    update_mean,
)
from ttalight.adapters.entropy import EntropyAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Outputs

__all__ = ["ETA"]


class ETA(EntropyAdapter):
    """Minimises the weighted entropy of the predictions that are confident and unlike those before.

    A sample counts if its entropy H is below E0 = ``margin`` ln C and the cosine of its prediction to the running mean
    of predictions lies between -``redundancy`` and ``redundancy``; its weight is exp(E0 - H). The running mean is
    updated by a tenth towards the mean prediction of the samples that count. One forward and one backward a batch;
    where nothing counts, nothing changes.

    Source: S. Niu, J. Wu, Y. Zhang, Y. Chen, S. Zheng, P. Zhao, M. Tan, *Efficient Test-Time Model Adaptation without
    Forgetting*, ICML 2022, arXiv 2204.02610: EATA without its penalty. The settings for CIFAR are those of the
    benchmark of R. Marsden, M. Döbler, B. Yang, arXiv 2306.00650. Unlike the authors' code E0 follows the network's own
    number of classes, the network stays in eval mode, and LayerNorm and GroupNorm affines adapt too. A reset clears the
    running mean of predictions; in the authors' code, and in the benchmark's, it lasts over resets, so that what was
    predicted before one makes samples after it redundant. Dense predictions, (B, C, H, W), count by an image's mean
    entropy and mean probabilities.

    Args:
        margin: E0 as a share of ln C, in (0, 1].
        redundancy: Samples at least this similar to the running mean are dropped, in (0, 1]; 1 drops
            exact repetitions only.
        kwargs: See ``EntropyAdapter``.

    Raises:
        ValueError: If an argument is out of range.
    """

    shards_batches = True

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200, "redundancy": 0.4},
        "cifar100": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200, "redundancy": 0.1},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "lr": 2.5e-4, "batch_size": 64, "redundancy": 0.05},
    }

    def __init__(self, margin: float = 0.4, redundancy: float = 0.4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < margin <= 1:
            raise InputError(f"margin must be a share of ln C in (0, 1], got {margin}")
        if not 0 < redundancy <= 1:
            raise InputError(f"redundancy must be a cosine in (0, 1], got {redundancy}")
        self.margin = margin
        self.redundancy = redundancy

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable affines, and begin without a mean prediction."""
        super().configure(net)
        dtype = torch.promote_types(net.parameters[0].dtype, torch.float32)
        self._mean = torch.full((net.classes,), torch.nan, dtype=dtype, device=net.device)

    def method_state(self) -> dict[str, Tensor]:
        """Return the running mean of predictions, NaN until the first sample counts."""
        return super().method_state() | {"mean_prediction": self._mean}

    def weigh(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return exp(E0 - H) of the samples that count, 0 for the others, and update the mean prediction."""
        logits = outputs.logits.detach()
        entropies = self.entropies(outputs).detach()
        margin = entropy_margins(self.margin, logits)
        predictions = image_probabilities(logits)
        # Of a sample that is not a number the entropy is none either; before the first mean the cosine is none.
        kept = (entropies < margin) & (redundancy(predictions, self._mean) >= self.redundancy).logical_not_()
        update_mean(self._mean, predictions, kept)
        return confidence_weight(entropies, margin).where(kept, 0)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {"margin": self.margin, "redundancy": self.redundancy}
