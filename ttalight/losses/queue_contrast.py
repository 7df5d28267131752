"""The contrastive loss against a queue of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.losses.similarity import check_temperature, check_vectors, unit_vectors

__all__ = ["queue_contrastive_loss"]


def queue_contrastive_loss(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Tell the key of each query from the keys of a queue.

    For a query q with key k the loss is -log(exp(sim(q, k)/t) / (exp(sim(q, k)/t) + sum_h exp(sim(q, h)/t))), where sim
    is the cosine and h runs over the queue. It is 0 where all of the queue is excluded. Similarities are float32 even
    for half-precision input and under autocast (float64 stays float64).

    Source: K. He, H. Fan, Y. Wu, S. Xie, R. Girshick, *Momentum Contrast for Unsupervised Visual Representation
    Learning*, CVPR 2020, arXiv 1911.05722. That negatives can be excluded is of D. Chen, D. Wang, T. Darrell, S.
    Ebrahimi, *Contrastive Test-Time Adaptation*, CVPR 2022, arXiv 2204.10377.

    Args:
        queries: (B, D). Any floating type; need not be normalised.
        keys: (B, D), of another view of the same images.
        queue: (K, D), vectors of other images.
        temperature: t > 0.
        excluded: Whether an entry of the queue is no negative of a query, boolean (B, K).

    Returns:
        (B,), float32 or float64.

    Raises:
        ValueError: If queries and keys differ in shape, or the temperature is not positive.
    """
    check_temperature(temperature)
    check_vectors(queries=queries, keys=keys)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, queue = unit_vectors(queries), unit_vectors(keys), unit_vectors(queue)
        positives = (queries * keys).sum(1, keepdim=True)
        negatives = queries @ queue.T
        if excluded is not None:
            negatives = negatives.masked_fill(excluded, -torch.inf)
        similarities = torch.cat((positives, negatives), dim=1) / temperature
        return similarities.logsumexp(1) - similarities[:, 0]
