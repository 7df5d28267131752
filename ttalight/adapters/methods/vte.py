"""VTE: the mean of the features of the surest views."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ttalight.adapters.views import EpisodicViewAdapter, check_share, surest_views
from ttalight.engine.adaptive_network import AdaptiveNetwork

__all__ = ["VTE"]


class VTE(EpisodicViewAdapter):
    """Predicts by the mean of the features of the views whose predictions have the lowest entropy.

    A linear classifier of the mean is the mean of the logits, which is what is computed. There is no state. ``views``
    forwards a batch.

    Source: the vision-text-space ensemble of M. Döbler, R. Marsden, T. Raichle, B. Yang, *A Lost Opportunity for
    Vision-Language Models: A Comparative Study of Online Test-Time Adaptation for Vision-Language Models*, arXiv
    2405.14977, after the authors' code. Its other half, text features averaged over prompts, is that of
    ``ensemble_text_features``.

    Args:
        share: Share of the views that are averaged, in (0, 1].
        kwargs: See ``ViewAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("averages features of random crops", "views")

    def __init__(self, share: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_share(share)
        self.share = share

    def merge(self, net: AdaptiveNetwork, logits: Tensor, features: Tensor) -> Tensor:
        """Return the mean of the logits of the surest views, (B, C)."""
        return surest_views(logits, self.share)[0].mean(1)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"share": self.share}
