"""Passes of a network under adaptation that change nothing: no weight, no statistic, no count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ttalight.engine import Engine
from ttalight.models.network import Outputs

__all__ = ["adapted_outputs", "source_outputs"]


@contextmanager
def _unchanged(engine: Engine, images: Tensor) -> Iterator[None]:
    net = engine.net
    before = net.forwards, net.pending_forwards, net.call
    net.call = net.call if images is net.images else None  # what else the network is called with belongs to the batch
    try:
        with torch.inference_mode(False), torch.no_grad(), net.pass_state.repeat():
            yield
    finally:
        net.forwards, net.pending_forwards, net.call = before


def adapted_outputs(engine: Engine, images: Tensor) -> Outputs:
    """Return the outputs of the network as it is now, normalised as its method does.

    They are the network's own outputs, before the corrections of methods such as T3A and LAME.

    Args:
        engine: The engine.
        images: (B, 3, H, W), on the network's device.
    """
    with _unchanged(engine, images):
        return engine.net(images)


def source_outputs(engine: Engine, images: Tensor) -> Outputs:
    """Return the outputs of the source model.

    Args:
        engine: The engine.
        images: (B, 3, H, W), on the network's device.
    """
    with _unchanged(engine, images), engine.at_source(), engine.net.as_source():
        return engine.net(images)
