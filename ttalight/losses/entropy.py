"""The entropy of predictions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["entropy"]


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy, in nats, of the softmax over dimension 1.

    Half-precision logits are taken to float32 first. Classes with probability 0, logits of minus infinity among them,
    contribute nothing, neither to the value nor to the gradient.

    Args:
        logits: (B, C) or (B, C, ...), such as (B, C, H, W). Log-probabilities are logits too.

    Returns:
        (B,) or (B, ...), between 0 and log C.

    Raises:
        ValueError: If there is no class dimension.
    """
    if logits.ndim < 2:
        raise ValueError(
            f"expected logits of shape (batch, classes) or (batch, classes, ...), got {tuple(logits.shape)}"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probabilities = logits.log_softmax(1)
    # 0 * -inf is NaN, 0 * (lowest float) is 0; a NaN passes the clamp.
    finite = log_probabilities.clamp_min(torch.finfo(logits.dtype).min)
    return (log_probabilities.exp() * -finite).sum(1)
