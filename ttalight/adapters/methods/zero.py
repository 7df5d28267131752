"""ZERO: a vote of the surest views."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ttalight.adapters.views import EpisodicViewAdapter, check_share, count_of, order_by_entropy
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.losses.entropy import log_probabilities

__all__ = ["ZERO", "vote"]


class ZERO(EpisodicViewAdapter):
    """Lets the views whose predictions have the lowest entropy vote for a class.

    A vote is a prediction at temperature zero, and the mean of such predictions is the result. A tie is broken by the
    next views in the order of their entropy. Returns log-probabilities. There is no state. ``views`` forwards a batch.

    Source: M. Farina, G. Franchi, G. Iacca, M. Mancini, E. Ricci, *Frustratingly Easy Test-Time Adaptation of
    Vision-Language Models*, NeurIPS 2024, arXiv 2405.18330, after the authors' code. Different from it: further views
    break a tie in the order of their entropy, where the code takes them in the order in which they were made; and half
    a vote is divided by the mean probabilities of the voting views, so that no class has probability zero.

    Args:
        share: Share of the views that vote, in (0, 1]. The paper has 0.1, and the authors' code 0.3 since.
        kwargs: See ``ViewAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("lets random crops vote", "views")

    def __init__(self, share: float = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_share(share)
        self.share = share

    def merge(self, net: AdaptiveNetwork, logits: Tensor, features: Tensor) -> Tensor:
        """Return the logarithm of the shares of votes, (B, C)."""
        return vote(logits, count_of(self.share, logits.shape[1]))

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"share": self.share}


def vote(logits: Tensor, voters: int) -> Tensor:
    """Return the logarithm of the shares of votes, (B, C); ties are broken by one vote more.

    Args:
        logits: Of the views, (B, V, C).
        voters: Number of the views that vote, those of lowest entropy.
    """
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    ordered = logits[rows, order_by_entropy(logits)]
    predicted = ordered.argmax(2)
    votes = ordered.new_zeros(len(logits), logits.shape[2])
    votes.scatter_add_(1, predicted[:, :voters], torch.ones_like(predicted[:, :voters], dtype=votes.dtype))
    tied = votes == votes.amax(1, keepdim=True)
    # The first further view for one of the tied classes; where there is none, the best of them for the next view.
    others = torch.cat([predicted[:, voters:], predicted[:, :1]], 1)
    agrees = tied.gather(1, others)
    agrees[:, -1] = False
    first = others.gather(1, agrees.to(torch.uint8).argmax(1, keepdim=True))
    next_view = ordered[:, min(voters, ordered.shape[1] - 1)]
    best = next_view.masked_fill(~tied, -torch.inf).argmax(1, keepdim=True)
    winner = torch.where(agrees.any(1, keepdim=True), first, best)
    votes.scatter_add_(1, winner, (tied.sum(1, keepdim=True) > 1).to(votes.dtype))
    mean = log_probabilities(ordered[:, :voters], dim=2).logsumexp(1) - math.log(2 * voters)
    return torch.logaddexp(votes.log(), mean).log_softmax(1)
