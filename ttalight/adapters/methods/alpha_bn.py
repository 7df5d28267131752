"""Batch statistics mixed with those of the source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttalight.adapters.adapter import Adapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Network

__all__ = ["AlphaBN"]

_PRIOR = 16.0


class AlphaBN(Adapter):
    """Normalises BatchNorm layers with a mixture of the source's statistics and the batch's.

    Means and variances are mixed; the batch's share is n / (n + N) for a batch of n images, where the source counts as
    N images, or a constant ``alpha``. Small batches lean on the source, so that single images work. One forward a
    batch, nothing learned.

    Source: S. Schneider, E. Rusak, L. Eck, O. Bringmann, W. Brendel, M. Bethge, *Improving robustness against common
    corruptions by covariate shift adaptation*, NeurIPS 2020, arXiv 2006.16971. The variance of the batch is the biased
    one, over n values a channel, that BatchNorm normalises with. The authors' code mixes the unbiased one, which
    BatchNorm keeps as running variance, n / (n - 1) times as large.

    Args:
        prior: Number N of images that the source statistics count as, at least 0.
        alpha: Constant share of the batch in [0, 1] instead; not together with another ``prior`` than the default.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range or both are given; at the first batch, if the network has no
            BatchNorm layer.
    """

    shards_batches = True

    def __init__(self, prior: float = _PRIOR, alpha: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if prior < 0:
            raise InputError(f"prior must be at least 0, got {prior}")
        if alpha is not None and not 0 <= alpha <= 1:
            raise InputError(f"alpha must lie in [0, 1], got {alpha}")
        if alpha is not None and prior != _PRIOR:
            raise InputError(
                f"give prior (a share that grows with the batch) or alpha (a constant share), not both: got "
                f"prior={prior} and alpha={alpha}"
            )
        self.prior, self.alpha = prior, alpha
        self.norm = "prior" if alpha is None else "alpha"

    def check(self, net: Network) -> None:
        """Check that there are BatchNorm layers whose statistics can be chosen."""
        for layer in net.batch_norms():
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Mix the statistics of all BatchNorm layers."""
        for layer in net.batch_norms():
            if self.alpha is None:
                layer.mode, layer.prior = "prior", self.prior
            else:
                layer.mode, layer.alpha = "alpha", self.alpha

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict with the mixed statistics."""
        with torch.no_grad():
            return net(images).logits

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        share = {"prior": self.prior} if self.alpha is None else {"alpha": self.alpha}
        return super().protocol() | share
