"""Predictions without adaptation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from ttalight.models.admission import pixel_fault

if TYPE_CHECKING:
    from ttalight.engine.engine import Engine

__all__ = ["next_state", "predict"]


def predict(engine: Engine, images: Tensor) -> Tensor:
    """Return the logits of a batch from the state that the next one begins with; see ``Engine.predict``.

    What this changes besides (counts, what is known of sizes, a method that is configured for it) the engine undoes.

    Args:
        engine: The engine.
        images: (B, 3, H, W).
    """
    net, guard, policy = engine.net, engine.net.guard, engine.method.on_bad_batch
    finite, fault = engine.admission.admit(images)
    guard.begin(images)
    net.begin(finite, is_bad=True)  # no step moves anything
    if engine.state is None and guard.is_pixels_finite() and fault is None:
        engine._configure()
    if engine.state is None:
        logits = engine._predict_source()
    else:
        guard.check_state()
        with engine.at_source() if engine._reset_is_due() else nullcontext():
            logits = engine.method.predict(net, finite).detach()
        guard.read()
    if fault is None and not guard.pixels_finite:
        fault = pixel_fault(images, net.counters.batch, net.counters.visit)
    if fault is not None and policy == "error":
        raise fault
    return engine._predict_source() if not guard.state_finite or (fault and policy == "source") else logits


def next_state(engine: Engine) -> AbstractContextManager[None]:
    """Set the state to the one that the next batch begins with for a while. One host synchronisation after steps."""
    is_source = engine._reset_is_due() or not engine.net.guard.is_state_finite()
    return engine.at_source() if is_source else nullcontext()
