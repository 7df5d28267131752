"""The entropy of an opinion: beliefs in the classes, and a share of uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.losses.entropy import entropy, is_masked

__all__ = ["opinion_entropy"]


def opinion_entropy(logits: Tensor) -> Tensor:
    """Entropy, in nats, of the opinion that logits stand for.

    The evidence for class c is exp(z_c). Of C classes each has the belief exp(z_c) / S, and what is left, C / S, is
    uncertainty, where S is the sum of all evidence plus C. The entropy is that of these C + 1 shares. The norm of a
    prediction's logits is taken as constant, so that gradients only turn them: a prediction cannot become certain by
    growing. Half-precision logits are taken to float32 first.

    Source: Q. Zhang, Y. Bian, X. Kong, P. Zhao, C. Zhang, *COME: Test-time Adaption by Conservatively Minimizing
    Entropy*, ICLR 2025, arXiv 2410.10894. Unlike the authors' code, C is the network's own number of classes that are
    not masked (theirs is 1000), and shares have no offset of 1e-7.

    Args:
        logits: (B, C) or (B, C, ...), such as (B, C, H, W); minus infinity for a class that is masked.

    Returns:
        (B,) or (B, ...), between 0 and log(C + 1).

    Raises:
        ValueError: If there is no class dimension.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    masked = is_masked(logits)
    left = logits.masked_fill(masked, 0)
    norm = torch.linalg.vector_norm(left, dim=1, keepdim=True)
    turned = (left * (norm.detach() / norm.clamp_min(torch.finfo(norm.dtype).tiny))).masked_fill(masked, -torch.inf)
    classes = (~masked).sum(1, keepdim=True).to(logits.dtype)
    return entropy(torch.cat([turned, classes.log()], 1))
