"""Prediction-time batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.adapters.adapter import Adapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.models.network import Network

__all__ = ["PTBN"]


class PTBN(Adapter):
    """Normalises every batch with its own statistics: prediction-time batch normalisation, also "BN-1" or "norm".

    Running statistics are neither used nor updated, so nothing carries over from batch to batch. One forward a batch.
    It wants batches of about 100 images or more from one domain.

    Source: Z. Nado et al., *Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift*,
    arXiv 2006.10963; S. Schneider et al., *Improving Robustness against Common Corruptions by Covariate Shift
    Adaptation*, NeurIPS 2020, arXiv 2006.16971 (the case without source statistics).

    Args:
        kwargs: See ``Adapter``.

    Raises:
        ValueError: At the first batch, if the network has no BatchNorm layer.
    """

    shards_batches = True

    norm = "batch"

    def check(self, net: Network) -> None:
        """Check that there are BatchNorm layers whose statistics can be chosen."""
        for layer in net.batch_norms():
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the BatchNorm layers to the batch's statistics."""
        net.set_norm_mode("batch", net.batch_norms())

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the logits under the batch's statistics."""
        with torch.no_grad():
            return net(images).logits
