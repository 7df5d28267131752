"""The entropy of predictions, and log-probabilities to which classes of probability 0 contribute nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError

__all__ = ["bounded", "entropy", "expectation", "is_masked", "log_probabilities"]

#: A log-probability whose exponential is 0 in any precision, and small enough to be multiplied by large gradients.
_LEAST = -1e4
#: How far below the largest logit the logits of masked classes lie. Networks mask with minus infinity, with the lowest
#: number of a type, or with -1e4 and less. The probability is 0 in any precision.
_FAR = 5e3


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
        raise InputError(
            f"expected logits of shape (batch, classes) or (batch, classes, ...), got {tuple(logits.shape)}"
        )
    log_p = log_probabilities(logits)
    return (log_p.exp() * -bounded(log_p)).sum(1)


def log_probabilities(logits: Tensor, dim: int = 1) -> Tensor:
    """Logarithm of the softmax over one dimension.

    Half precision is taken to float32 first.

    Args:
        logits: (B, C) or (B, C, ...); minus infinity for a class that is masked, which has probability 0.
        dim: The dimension of the classes.

    Returns:
        Of the same shape, float32 or float64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(dim)


def is_masked(logits: Tensor, dim: int = 1) -> Tensor:
    """Return which classes are masked: their logits lie so far below the largest that no probability is left for them.

    Args:
        logits: (B, C) or (B, C, ...).
        dim: The dimension of the classes.

    Returns:
        Boolean, of the same shape.
    """
    logits = logits.detach()
    return logits < logits.amax(dim, keepdim=True) - _FAR


def bounded(log_p: Tensor) -> Tensor:
    """Log-probabilities with a finite value in place of minus infinity.

    Its exponential is 0 all the same, so that p log p is 0 where p is, and no gradient flows there. NaN stays.

    Args:
        log_p: Log-probabilities of any shape.
    """
    return log_p.clamp_min(_LEAST)


def expectation(log_p: Tensor, values: Tensor, dim: int = 1) -> Tensor:
    """Sum of p times a value over the classes, where a class with p = 0 counts as 0 whatever its value is.

    Args:
        log_p: Log-probabilities.
        values: Of the same shape; may be infinite or NaN where p is 0.
        dim: The dimension of the classes.

    Returns:
        The shape without that dimension.
    """
    p = log_p.exp()
    return (p * values.masked_fill(p == 0, 0)).sum(dim)
