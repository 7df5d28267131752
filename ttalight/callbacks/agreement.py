"""Agreement of adapted predictions with those of the source model, for images without labels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ttalight.engine import Engine
from ttalight.models.outputs import logits_of

__all__ = ["agreement", "source_agreement"]


def agreement(logits: Tensor, other: Tensor) -> Tensor:
    """Return which predictions are the same class.

    Args:
        logits: (B, C) or (B, C, H, W).
        other: Logits of the other model, of the same shape.

    Returns:
        float64 (B,): 1 or 0, of a dense prediction the fraction of its pixels.
    """
    same = (logits.argmax(dim=1) == other.argmax(dim=1)).double()
    return same if same.ndim == 1 else same.flatten(1).mean(dim=1)


@torch.no_grad()
def source_agreement(engine: Engine, images: Tensor, logits: Tensor) -> Tensor:
    """Return which predictions are those of the source model: one more pass, which nothing of the run counts.

    Args:
        engine: The engine of the adapter.
        images: The images of the batch, (B, 3, H, W).
        logits: The adapted predictions of it, (B, C) or (B, C, H, W).

    Returns:
        float64 (B,), see `agreement`.
    """
    net = engine.net
    with engine.at_source(), net.as_source(), net.precision():
        run = net.original if net.pass_state.shard is None else partial(net.pass_state.shard, net.original)
        return agreement(logits, logits_of(run(images), net.output))
