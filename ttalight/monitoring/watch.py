"""A watch over a model that adapts, which acts when adaptation fails."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ttalight.engine import Engine
from ttalight.engine.schedule import Schedule
from ttalight.errors import InputError
from ttalight.monitoring.hysteresis import SIGNALS, Limit, Readings, Reference, crossings
from ttalight.monitoring.observer import LateReads, Monitoring
from ttalight.monitoring.report import Report
from ttalight.monitoring.signals import flat_predictions, prediction_sums, relative_distance, shannon

__all__ = ["Trip", "Watch"]

_LOG = logging.getLogger(__name__)
_ACTIONS = ("reset", "rollback", "freeze")
#: Predictions that the reference of entropy and diversity is made from, at least.
_FIRST = 64


@dataclass(frozen=True)
class Trip:
    """A signal that went beyond its limit.

    Args:
        batch: Number of the batch, from 1, that the signal was last measured on.
        signal: Its name, as in ``Watch.signals``; or ``not_finite``.
        value: Its value.
        limit: The limit.
        action: What was done.
    """

    batch: int
    signal: str
    value: float
    limit: float
    action: str


class Frozen(Schedule):
    """Adapts to no batch."""

    def adapts(self, batch: int, images: int) -> bool:
        """Return False."""
        return False


class Watch(Monitoring):
    """Watches for signs that adaptation fails, without labels, and acts.

    Signals of a batch are numbers on the device. They are read with the next batch, so that nothing waits for them, and
    the action comes at that batch's end. A signal has to be beyond its limit for ``patience`` batches in a row. It can
    trip again only after it was calm: well inside the limit, or after a reset or rollback.

    - *Collapse to few classes*: the share of the commonest class among the last predictions, with a binomial bound
      that takes their number and that of the classes into account; and the effective number of classes (the
      exponential of the mean prediction's entropy), compared with that of the first images.
    - *Entropy*: far below that of the first images, or near that of uniform predictions.
    - *Weights*: their distance from the source, and from those before the batch, relative to the source's norm.
    - *Not finite*: predictions or weights. This trips with the first such batch.

    The bound on class shares assumes that images come in an order that has nothing to do with their classes. On a
    stream whose classes come in runs, a large share of one class is no sign of failure. Set ``share`` and ``diversity``
    to None there.

    Args:
        action: ``reset`` to the source; ``rollback`` to the last state that ``good_after`` batches have shown to be
            good, or to the source where there is none; ``freeze``, the same, and from then on batches are predicted
            only, as after ``adapted.freeze()``, counted as ``missed`` and seen by no monitor, until ``thaw()``; or a
            function of the engine and the trip.
        share: Limit on the share of the commonest class, as a part of the way from 1 / C to 1: with the default 0.5 it
            is 0.55 of ten classes and 0.75 of two. None, here and below, turns the signal off.
        diversity: Least effective number of classes above one, as a fraction of the first images'.
        low_entropy: Least mean entropy, as a fraction of the first images'.
        high_entropy: Largest mean entropy, as a fraction of ln C. It counts only above twice that of the first images.
        drift: Largest distance of the weights from the source, divided by the source's norm.
        step: Largest distance of the weights from those before the batch, divided by the source's norm.
        window: Predictions that shares and entropies are measured on: the last batches that hold so many together.
        patience: Batches in a row that a signal has to be beyond its limit.
        good_after: Batches between two states that are kept for a rollback, and batches without a suspicion that make a
            state a good one.
        reference: A report of healthy predictions, of the source on its own images for example, to compare entropy and
            diversity with; by default the first images, at least 64 predictions.
    """

    def __init__(
        self,
        action: Literal["reset", "rollback", "freeze"] | Callable[[Engine, Trip], Any] = "reset",
        share: float | None = 0.5,
        diversity: float | None = 0.25,
        low_entropy: float | None = 0.02,
        high_entropy: float | None = 0.9,
        drift: float | None = 1.0,
        step: float | None = 0.25,
        window: int = 256,
        patience: int = 2,
        good_after: int = 10,
        reference: Report | None = None,
    ) -> None:
        if not callable(action) and action not in _ACTIONS:
            raise InputError(f"action must be one of {', '.join(_ACTIONS)} or a function, got {action!r}")
        fractions = {"share": share, "diversity": diversity, "low_entropy": low_entropy, "high_entropy": high_entropy}
        for name, value in fractions.items():
            if value is not None and not 0 < value <= 1:
                raise InputError(f"{name} must be above 0 and at most 1, or None, got {value}")
        for name, value in {"drift": drift, "step": step}.items():
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above 0, or None, got {value}")
        for name, count in {"window": window, "patience": patience, "good_after": good_after}.items():
            if count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        if reference is not None and (reference.entropy is None or reference.effective_classes is None):
            raise InputError("reference must be a report that has seen predictions, got one before the first batch")
        self.action = action
        self.limits: dict[str, float | None] = {**fractions, "drift": drift, "step": step}
        self.window, self.patience, self.good_after, self.reference = window, patience, good_after, reference
        self._schedule = Frozen()
        self._frozen: Engine | None = None
        self._forget()

    def _forget(self) -> None:
        #: The trips so far, and how often each signal has tripped.
        self.trips: list[Trip] = []
        self.counts: Counter[str] = Counter()
        #: The signals that were read last, and their limits.
        self.signals: dict[str, float] = {}
        self._reference: Reference | None = None
        if self.reference is not None:
            self._reference = Reference(self.reference["entropy"], self.reference["effective_classes"])
        self._kept: dict[str, Any] | None = None
        self._good: dict[str, Any] | None = None
        self._weights: list[Tensor] | None = None
        self._clear()

    def _clear(self) -> None:
        """Forget the signals of the model before it was restored."""
        self._window: deque[tuple[Tensor, int]] = deque()
        self._late, self._pending = LateReads(), (0, 0)
        self._calm_batches = 0
        self._states = {name: Limit(1 if name == "not_finite" else self.patience) for name in SIGNALS}

    def begin(self, engine: Engine) -> None:
        """Begin with a network of which nothing is known."""
        self.thaw()
        self._forget()
        self._remember(engine)

    def see(self, engine: Engine, logits: Tensor) -> None:
        """Measure the batch, and decide on the one before."""
        if self._window and self._window[0][0].device != logits.device:
            self._clear()
        values, place = self._measure(engine, logits), self._pending
        self._pending = engine.batches, sum(count for _, count in self._window)
        seen = self._late.exchange(values)
        if seen is not None:
            self._decide(engine, place[0], Readings(place[1], logits.shape[1], *seen))
        self._keep(engine)
        self._remember(engine)

    @property
    def is_frozen(self) -> bool:
        """Whether the model adapts to no batch, until ``thaw()``."""
        return self._frozen is not None

    def thaw(self) -> None:
        """Let a frozen model adapt again."""
        if self._frozen is not None:
            self._frozen.schedules.remove(self._schedule)
        self._frozen = None
        self._clear()

    # -- signals

    def _measure(self, engine: Engine, logits: Tensor) -> Tensor:
        rows = flat_predictions(logits)
        self._window.append((prediction_sums(rows), len(rows)))
        while sum(count for _, count in self._window) - self._window[0][1] >= self.window:
            self._window.popleft()
        sums, classes = torch.stack([sums for sums, _ in self._window]).sum(0).double(), rows.shape[1]
        images = sum(count for _, count in self._window)
        predicted = [sums[0] / images, sums[1 : 1 + classes].max(), shannon(sums[1 + classes :]).exp()]
        return torch.stack([value.double() for value in (*predicted, *self._moves(engine, sums))])

    def _moves(self, engine: Engine, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relative distance of the weights from the source, and from those before the batch."""
        weights, state = engine.net.parameters, engine.state
        if not weights or state is None:
            return like.new_zeros(()), like.new_zeros(())
        source, before = list(state.source.values())[: len(weights)], self._weights
        drift = relative_distance(weights, source)
        if before is None or engine.net.counters.updates_at_reset != self._reset_at:
            return drift, drift  # the batch began with the source
        return drift, relative_distance(weights, before, source)

    def _remember(self, engine: Engine) -> None:
        """Note the weights that the next batch begins with, and when they were last reset."""
        self._reset_at = engine.net.counters.updates_at_reset
        weights = [weight.detach() for weight in engine.net.parameters] if engine.state is not None else []
        if weights and self._weights is not None and self._weights[0].device == weights[0].device:
            torch._foreach_copy_(self._weights, weights)
        elif weights:
            self._weights = [weight.clone() for weight in weights]

    # -- decisions

    def _decide(self, engine: Engine, batch: int, seen: Readings) -> None:
        if self._reference is None and seen.is_finite and seen.images >= min(_FIRST, self.window):
            self._reference = Reference(seen.entropy, seen.effective_classes)
        reference = self._reference or Reference(0.0, 0.0)
        found = crossings(seen, reference, **self.limits)
        found["not_finite"] = (0.0 if seen.is_finite else 1.0, 0.0, not seen.is_finite, seen.is_finite)
        self.signals = {name: value for name, (value, *_) in found.items() if name != "not_finite"}
        suspicious = any(is_beyond for *_, is_beyond, _ in found.values())
        self._calm_batches = 0 if suspicious else self._calm_batches + 1
        name_of_action = self.action if isinstance(self.action, str) else getattr(self.action, "__name__", "function")
        tripped = [
            Trip(batch, name, value, limit, name_of_action)
            for name, (value, limit, is_beyond, is_calm) in found.items()
            if self._states[name].update(is_beyond, is_calm)
        ]
        for trip in tripped:
            self.trips.append(trip)
            self.counts[trip.signal] += 1
            _LOG.warning(
                "%s, batch %d: %s is %.3g, its limit %.3g: %s",
                type(engine.method).__name__, batch, trip.signal, trip.value, trip.limit, trip.action,
            )  # fmt: skip
        if tripped:
            self._act(engine, tripped[0])

    def _act(self, engine: Engine, trip: Trip) -> None:
        if callable(self.action):
            self.action(engine, trip)
            return
        if self.action == "freeze":
            self._frozen = engine
            engine.schedules.append(self._schedule)
        if self.action != "reset" and self._good is not None and engine.state is not None:
            engine.state.restore(self._good)
        else:
            engine.net.reset()
        self._kept = None
        self._clear()

    def _keep(self, engine: Engine) -> None:
        """Keep a state for a rollback, and make the one kept before a good one, where batches have shown it to be."""
        if self.action not in ("rollback", "freeze") or engine.state is None or engine.batches % self.good_after:
            return
        if self._kept is not None and self._calm_batches >= self.good_after:
            self._good = self._kept
        if self._calm_batches:
            self._kept = engine.state.capture()

    def curves(self) -> dict[str, float]:
        """Return the signals and the number of trips, for a logger."""
        return {**{f"watch/{name}": value for name, value in self.signals.items()}, "watch/trips": len(self.trips)}
