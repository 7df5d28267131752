"""The entropy of predictions."""

from __future__ import annotations

from torch import Tensor

from ttalight.losses.probabilities import bounded, log_probabilities

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
    log_p = log_probabilities(logits)
    return (log_p.exp() * -bounded(log_p)).sum(1)
