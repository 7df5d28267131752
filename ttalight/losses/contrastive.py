"""The contrastive loss between two views of every image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ttalight.losses.similarity import check_temperature, check_vectors, gather_candidates, unit_vectors

__all__ = ["ContrastiveLoss", "contrastive_loss"]

#: Anchors whose similarities are in memory at a time.
_ROWS = 1024


def contrastive_loss(
    first: Tensor, second: Tensor, temperature: float, *, symmetric: bool = True, gather: bool = False
) -> Tensor:
    """Tell each image's other view from all other views of the batch (normalised temperature-scaled cross-entropy).

    For an anchor u with partner v the term is -log(exp(sim(u, v)/t) / sum_h exp(sim(u, h)/t)), where sim is the
    cosine and h runs over the 2B views of the batch except u itself (2B - 1 terms, the partner among them). The loss
    is the mean of the terms.

    Similarities are float32 even for half-precision input and under autocast (float64 stays float64): at temperature
    0.01 bfloat16 would shift logits by up to about 0.4. Zero vectors have similarity 0 to everything and no
    gradient. Of more than 1,024 anchors similarities are computed for so many at a time, and again on the way back, so
    that memory grows with B and not with its square; second derivatives are not there.

    Source: T. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, arXiv
    2002.05709; Eq. 1 of S. Barbeau et al., "CTA: Cross-Task Alignment for Better Test Time Training", arXiv
    2507.05221. Eq. 1 has first views only as anchors (``symmetric=False``) and a sum where this has a mean: multiply
    by B for the sum. The symmetric form of SimCLR has the same expected gradient with less variance, since the views
    are exchangeable.

    Args:
        first: (B, D), one view of every image. Any floating type; need not be normalised.
        second: (B, D), the other view of the same images.
        temperature: t > 0.
        symmetric: Average over both views as anchors (2B terms); False takes the first views only (B terms).
        gather: Compare with the vectors of all ranks, B being equal on all of them. Anchors stay local, so that the
            mean over ranks, of the loss and of its gradients, is that of one process with the whole batch.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If shapes differ, the whole batch has fewer than two images, or the temperature is not positive.
    """
    check_temperature(temperature)
    check_vectors(first=first, second=second)
    with torch.autocast(first.device.type, enabled=False):
        first, second = unit_vectors(first), unit_vectors(second)
        candidates, offset = gather_candidates(first, second, gather=gather)
        anchors = torch.cat((first, second)) if symmetric else first
        columns = torch.arange(len(first), device=first.device) + offset
        other = columns + len(candidates) // 2
        own, partner = (torch.cat((columns, other)), torch.cat((other, columns))) if symmetric else (columns, other)
        loss: Tensor = _CrossEntropy.apply(anchors / temperature, candidates, own, partner)  # type: ignore[no-untyped-call]
        return loss


class ContrastiveLoss(nn.Module):
    """:func:`contrastive_loss` with its hyper-parameters.

    Args:
        temperature: Positive. 0.01 is what CTA trains and adapts with.
        symmetric: Both views are anchors; False: the first only.
        gather: Compare with the vectors of all ranks.

    Raises:
        ValueError: If the temperature is not positive.
    """

    def __init__(self, temperature: float = 0.01, symmetric: bool = True, gather: bool = False) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.symmetric = symmetric
        self.gather = gather

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two views, (B, D) each; a scalar."""
        return contrastive_loss(first, second, self.temperature, symmetric=self.symmetric, gather=self.gather)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"temperature={self.temperature}, symmetric={self.symmetric}, gather={self.gather}"


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of each anchor's products with the candidates, ``own`` left out and ``partner`` the label."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, own: Tensor, partner: Tensor) -> Tensor:
        normalizers, matches, only = [], [], None
        for rows, part in _chunks(anchors, candidates, own):
            normalizers.append(part.logsumexp(1))
            matches.append(part.gather(1, partner[rows, None]))
            if len(anchors) <= _ROWS:
                only = part  # small enough to be kept for the way back
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(anchors, candidates, own, partner, normalizer, only)
        return (normalizer - torch.cat(matches)[:, 0]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        anchors, candidates, own, partner, normalizer, only = ctx.saved_tensors
        of_anchors, of_candidates = torch.empty_like(anchors), torch.zeros_like(candidates)
        chunks = _chunks(anchors, candidates, own) if only is None else [(slice(0, len(anchors)), only.clone())]
        for rows, part in chunks:
            part.sub_(normalizer[rows, None]).exp_()
            part.scatter_add_(1, partner[rows, None], part.new_full((len(part), 1), -1))
            torch.mm(part, candidates, out=of_anchors[rows])
            of_candidates.addmm_(part.T, anchors[rows])
        scale = gradient / len(anchors)
        return of_anchors * scale, of_candidates * scale, None, None


def _chunks(anchors: Tensor, candidates: Tensor, own: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the products of some anchors at a time with all candidates, minus infinity where ``own`` says."""
    for start in range(0, len(anchors), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, (anchors[rows] @ candidates.T).scatter_(1, own[rows, None], float("-inf"))
