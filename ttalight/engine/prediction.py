"""Predictions without adaptation: the half of the engine that changes nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.method import Method
from ttalight.engine.schedule import Schedule, run_scheduled
from ttalight.engine.state import State
from ttalight.models.attaching.admission import Admission, pixel_fault
from ttalight.models.attaching.call import Call

__all__ = ["Predictor"]


class Predictor(ABC):
    """Base of ``Engine`` that predicts with the present state."""

    method: Method
    net: AdaptiveNetwork
    admission: Admission
    state: State | None
    schedules: list[Schedule]
    #: Whether a schedule let the last batch be predicted only.
    is_missed: bool = False

    @abstractmethod
    def __call__(self, images: Tensor, call: Call | None = None, adapt: bool = True) -> Any:
        """Adapt to a batch, or predict it, and return its logits."""

    @abstractmethod
    def at_source(self) -> AbstractContextManager[None]:
        """Set weights, statistics and method state to the source temporarily."""

    @abstractmethod
    def _configure(self) -> None: ...
    @abstractmethod
    def _predict_source(self) -> Tensor: ...
    @abstractmethod
    def _reset_is_due(self) -> bool: ...

    def predict(self, images: Tensor, call: Call | None = None) -> Any:
        """Return the logits of a batch without adapting to it; nothing changes. See ``Engine.__call__``.

        They come from ``Method.predict`` and the state that the next batch would begin with: that of the source where a
        reset is due, which with ``reset="batch"`` it always is. A network that was not adapted yet predicts as the
        method's source. Bad batches are an error or are predicted, as ``on_bad_batch`` says. They are not counted.
        """
        return self(images, call, adapt=False)

    def scheduled(self, images: Tensor, call: Call | None = None, adapt: bool = True) -> Any:
        """Adapt to a batch, or predict it where a schedule says that; see ``__call__``."""
        return run_scheduled(self, images, call) if adapt and self.schedules else self(images, call, adapt)

    def next_state(self) -> AbstractContextManager[None]:
        """Set the state temporarily to the one that the next batch begins with. May wait for the device once."""
        is_source = self._reset_is_due() or not self.net.guard.is_state_finite()
        return self.at_source() if is_source else nullcontext()

    def _predict(self, images: Tensor) -> Tensor:
        """Return the logits of a batch. ``__call__`` undoes everything that this changes, counts and sizes included."""
        net, guard, policy = self.net, self.net.guard, self.method.on_bad_batch
        finite, fault = self.admission.admit(images)
        guard.begin(images)
        net.begin(finite, is_bad=True)  # no step updates anything
        if self.state is None and guard.is_pixels_finite() and fault is None:
            self._configure()
        if self.state is None:
            logits = self._predict_source()
        else:
            guard.check_state()
            with self.at_source() if self._reset_is_due() else nullcontext():
                logits = self.method.predict(net, finite).detach()
            guard.read()
        if fault is None and not guard.pixels_finite:
            fault = pixel_fault(images, net.counters.batch, net.counters.visit)
        if fault is not None and policy == "error":
            raise fault
        return self._predict_source() if not guard.state_finite or (fault and policy == "source") else logits
