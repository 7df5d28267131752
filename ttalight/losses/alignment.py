"""The cross-encoder alignment loss of CTA."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.losses.similarity import check_temperature, check_vectors, gather_candidates, unit_vectors

__all__ = ["AlignmentLoss", "Sibling", "alignment_loss"]

Sibling = Literal["negative", "exclude", "positive"]


def alignment_loss(
    first: Tensor,
    second: Tensor,
    target: Tensor,
    temperature: float,
    *,
    sibling: Sibling = "negative",
    gather: bool = False,
) -> Tensor:
    """Pull both views of every image to the image's target vector and away from everything else in the batch.

    For an anchor u, a view of image i, the term is -log(exp(sim(u, w_i)/t) / sum_s exp(sim(u, s)/t)), where sim is the
    cosine, w_i the target of image i, and s runs over the 2B views and B targets of the batch except u itself (3B - 1
    terms). Both views of every image are anchors, targets never are. The loss is the mean over the 2B anchors.

    Similarities are float32 even for half-precision input and under autocast (float64 stays float64). Zero vectors have
    similarity 0 to everything and no gradient.

    Source: Eq. 4 of S. Barbeau et al., "CTA: Cross-Task Alignment for Better Test Time Training", arXiv 2507.05221;
    no code was published. Two readings of it are settled here: the targets are the supervised encoder's features,
    f(x_i), not the classifier's output as printed (whose dimension does not fit), and H, which the paper leaves
    undefined, is the set of both views. The paper sums where this has a mean: multiply by 2B for the sum.

    Args:
        first: (B, D), one view of every image, through the encoder being trained. Need not be normalised.
        second: (B, D), the other view of the same images.
        target: (B, D), vectors of the same images from the other encoder. They are not detached here, so that both
            encoders can be trained together: pass ``target.detach()`` for a frozen one whose graph was recorded.
        temperature: t > 0.
        sibling: What an anchor's other view is to it. "negative": one of the 3B - 1 terms below the fraction (Eq. 4
            as printed); "exclude": left out (3B - 2 terms); "positive": the term is the mean of the log-probabilities
            of the target and of the other view.
        gather: Compare with the vectors of all ranks, B being equal on all of them. Anchors stay local, so that the
            mean over ranks, of the loss and of its gradients, is that of one process with the whole batch.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If shapes differ, the whole batch has fewer than two images, the temperature is not positive, or
            ``sibling`` is none of the three.
    """
    check_temperature(temperature)
    _check_sibling(sibling)
    check_vectors(first=first, second=second, target=target)
    with torch.autocast(first.device.type, enabled=False):
        first, second, target = unit_vectors(first), unit_vectors(second), unit_vectors(target)
        candidates, offset = gather_candidates(first, second, target, gather=gather)
        logits = (torch.cat((first, second)) / temperature) @ candidates.T
        columns = torch.arange(len(first), device=first.device) + offset
        total = len(candidates) // 3
        own = torch.cat((columns, columns + total))[:, None]
        other = torch.cat((columns + total, columns))[:, None]
        positive = torch.cat((columns, columns))[:, None] + 2 * total
        masked = torch.cat((own, other), dim=1) if sibling == "exclude" else own
        logits.scatter_(1, masked, float("-inf"))
        attraction = logits.gather(1, torch.cat((positive, other), dim=1) if sibling == "positive" else positive)
        return (logits.logsumexp(1) - attraction.mean(1)).mean()


def _check_sibling(sibling: str) -> None:
    if sibling not in get_args(Sibling):
        raise InputError(f"sibling must be one of {', '.join(get_args(Sibling))}, got {sibling!r}")


class AlignmentLoss(nn.Module):
    """:func:`alignment_loss` with its hyper-parameters.

    Args:
        temperature: Positive. 0.5 is CTA's; smaller values align worse.
        sibling: What an anchor's other view is to it: "negative", "exclude" or "positive".
        gather: Compare with the vectors of all ranks.

    Raises:
        ValueError: If the temperature is not positive or ``sibling`` is none of the three.
    """

    def __init__(self, temperature: float = 0.5, sibling: Sibling = "negative", gather: bool = False) -> None:
        super().__init__()
        check_temperature(temperature)
        _check_sibling(sibling)
        self.temperature = temperature
        self.sibling: Sibling = sibling
        self.gather = gather

    def forward(self, first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        """The loss of two views and their targets, (B, D) each; a scalar."""
        return alignment_loss(first, second, target, self.temperature, sibling=self.sibling, gather=self.gather)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"temperature={self.temperature}, sibling={self.sibling!r}, gather={self.gather}"
