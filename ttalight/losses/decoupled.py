"""The entropy in two parts, of which one is measured against the mean prediction: AdaDEM."""

from __future__ import annotations

from torch import Tensor

from ttalight.losses.entropy import is_masked, log_probabilities

__all__ = ["decoupled_entropy"]


def decoupled_entropy(logits: Tensor, marginal: Tensor) -> Tensor:
    """Loss of AdaDEM for each prediction.

    The entropy of p = softmax(z) is -sum_c p_c z_c plus the logarithm of sum_c exp(z_c). The first part makes a
    prediction certain. The second one holds it back, and has the gradient p. Here the mean prediction m takes the place
    of that gradient: the loss is (sum_c m_c z_c - sum_c p_c z_c) / d. So classes that are predicted often are held back
    most. The divisor d is the sum of the absolute derivatives of the first part, without gradient, so that certain
    predictions count like others. Half-precision logits are taken to float32 first.

    Source: J. Ma, H. Li, X. Xiang, *Decoupled Entropy Minimization*, NeurIPS 2025, arXiv 2511.03256. The authors' code
    was not available to us. That d divides both parts is our reading of the paper's appendix D.6, by which it reweights
    the loss of a sample.

    Args:
        logits: (B, C) or (B, C, ...), such as (B, C, H, W). Minus infinity for a class that is masked.
        marginal: Mean prediction m, (C,), without gradient, 0 for masked classes.

    Returns:
        (B,) or (B, ...).
    """
    p = log_probabilities(logits).exp()
    z = logits.to(p.dtype).masked_fill(is_masked(logits), 0)
    mean = (p * z).sum(1)
    rewards = p.detach() * (1 + z.detach() - mean.detach().unsqueeze(1))
    held = (marginal.to(p.dtype).view(-1, *[1] * (logits.ndim - 2)) * z).sum(1)
    return (held - mean) / rewards.abs().sum(1)
