"""Limits on signals, with hysteresis: a signal trips after several batches and again only after it was calm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ttalight.monitoring.bounds import log_chernoff_tail

__all__ = ["SIGNALS", "Limit", "Readings", "Reference", "crossings"]

SIGNALS = ("commonest_share", "effective_classes", "low_entropy", "high_entropy", "drift", "step", "not_finite")

#: Bound on the probability that one look at a class share exceeds its limit by chance.
_CHANCE = 1e-6
#: Share of a limit that a signal has to be back inside of to be calm.
_RELEASE = 0.8


@dataclass(frozen=True)
class Readings:
    """Signals of the last batches, on the host.

    Args:
        images: Predictions that entropy and classes are measured on.
        classes: Number of classes.
        entropy: Mean entropy in nats.
        commonest: Number of predictions of the commonest class.
        effective_classes: Effective number of classes of the mean prediction.
        drift: Relative distance of the weights from the source.
        step: Relative distance of the weights from those before the batch.
    """

    images: int
    classes: int
    entropy: float
    commonest: float
    effective_classes: float
    drift: float
    step: float

    @property
    def is_finite(self) -> bool:
        """Whether all signals are finite."""
        return all(map(math.isfinite, (self.entropy, self.effective_classes, self.drift, self.step)))


@dataclass(frozen=True)
class Reference:
    """Signals of healthy predictions, which others are compared with.

    Args:
        entropy: Mean entropy in nats.
        effective_classes: Effective number of classes of the mean prediction.
    """

    entropy: float
    effective_classes: float


@dataclass
class Limit:
    """Decides when a signal trips.

    Args:
        patience: Batches in a row that a signal has to be beyond its limit.
    """

    patience: int
    beyond: int = 0
    is_armed: bool = True

    def update(self, is_beyond: bool, is_calm: bool) -> bool:
        """Return whether the signal trips with this batch.

        Args:
            is_beyond: Whether the signal is beyond its limit.
            is_calm: Whether it is well inside.
        """
        self.beyond = self.beyond + 1 if is_beyond else 0
        self.is_armed = self.is_armed or is_calm
        trips = self.is_armed and self.beyond >= self.patience
        self.is_armed = self.is_armed and not trips
        return trips


def crossings(
    seen: Readings,
    reference: Reference,
    share: float | None,
    diversity: float | None,
    low_entropy: float | None,
    high_entropy: float | None,
    drift: float | None,
    step: float | None,
) -> dict[str, tuple[float, float, bool, bool]]:
    """Return for each signal its value, its limit, whether it is beyond that, and whether it is calm.

    The share of the commonest class is beyond its limit if so many predictions of one class have a probability below
    1e-6 where no class has a larger share than the limit: few images have to be nearly all of one class, many need not.
    The logarithm of the number of classes is added, for each could be the commonest one.

    Args:
        seen: The signals.
        reference: What entropy and number of classes are compared with.
        share: Limit of the share of the commonest class, as a part of the way from 1 / C to 1. None, here and
            below, sets no limit.
        diversity: Least effective number of classes above one, as a fraction of the reference's.
        low_entropy: Least entropy, as a fraction of the reference's.
        high_entropy: Largest entropy, as a fraction of ln C; it counts only above twice the reference's.
        drift: Largest relative distance of the weights from the source.
        step: Largest relative distance of the weights from those before the batch.
    """
    found = {}
    if share is not None:
        limit = 1 / seen.classes + share * (1 - 1 / seen.classes)
        tail = log_chernoff_tail(seen.commonest, seen.images, limit) + math.log(seen.classes)
        value = seen.commonest / seen.images
        found["commonest_share"] = (value, limit, tail < math.log(_CHANCE), value <= limit)
    if diversity is not None:
        limit = 1 + diversity * (reference.effective_classes - 1)
        found["effective_classes"] = _least(seen.effective_classes, limit)
    if low_entropy is not None:
        found["low_entropy"] = _least(seen.entropy, low_entropy * reference.entropy)
    if high_entropy is not None:
        limit = max(high_entropy * math.log(seen.classes), 2 * reference.entropy)
        found["high_entropy"] = _most(seen.entropy, limit)
    if drift is not None:
        found["drift"] = _most(seen.drift, drift)
    if step is not None:
        found["step"] = _most(seen.step, step)
    return found


def _least(value: float, limit: float) -> tuple[float, float, bool, bool]:
    return value, limit, value < limit, value * _RELEASE >= limit


def _most(value: float, limit: float) -> tuple[float, float, bool, bool]:
    return value, limit, value > limit, value <= limit * _RELEASE
