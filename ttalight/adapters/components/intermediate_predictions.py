"""Predictions after fewer steps than a run takes, read along the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.models.network import Network, Outputs

__all__ = ["check_readings", "predict", "steps_with_readings"]


def check_readings(read_at: Sequence[int], steps: int, reset: object) -> tuple[int, ...]:
    """Return the numbers of steps to read predictions at, sorted.

    Args:
        read_at: Numbers of steps below ``steps``.
        steps: Steps that the method takes for each batch.
        reset: When the method goes back to the source.

    Raises:
        ValueError: If a number is out of range, or if the method does not start every batch from the source: after
            the first batch its predictions in between are then not those of a run with fewer steps.
    """
    chosen = tuple(sorted(set(read_at)))
    if chosen and (chosen[0] < 0 or chosen[-1] >= steps):
        raise InputError(f"read_at takes numbers of steps from 0 to {steps - 1} (steps - 1), got {list(read_at)}")
    if chosen and reset != "batch":
        raise InputError(
            f"read_at needs reset='batch', got reset={reset!r}: only where every batch starts from the source are "
            "predictions in between those of a run with fewer steps; make a run for each number of steps instead"
        )
    return chosen


def predict(net: Network, images: Tensor, norm: str) -> Tensor:
    """Return the logits of un-augmented images, from the batch's statistics or from the running ones.

    Args:
        net: The network.
        images: (B, 3, H, W).
        norm: ``batch`` for statistics of these images; anything else for the running ones, which may have been updated.
    """
    with torch.no_grad():
        return pass_for_prediction(net, images, norm).logits


def pass_for_prediction(net: Network, images: Tensor, norm: str) -> Outputs:
    """Return the outputs that a prediction is made from; see ``predict``. No statistics are updated."""
    return net(images, norm="batch" if norm == "batch" else "source")


def steps_with_readings(
    net: Network, images: Tensor, steps: int, read_at: Sequence[int], norm: str = "source"
) -> Iterator[int]:
    """Count steps from 0, and before those named put the prediction into ``net.readings``.

    A reading is one more forward; it updates no statistics and draws nothing, so that the run continues as without it.

    Args:
        net: The network.
        images: (B, 3, H, W).
        steps: Number of steps.
        read_at: Numbers of steps after which to predict.
        norm: See ``predict``.
    """
    for step in range(steps):
        if step in read_at:
            net.readings[step] = predict(net, images, norm)
        yield step
