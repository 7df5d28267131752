"""Schedules, which decide whether a batch is adapted to or predicted with the present state."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.files.difference import Between, difference
from ttalight.models.attaching.call import Call
from ttalight.models.outputs import logits_of

__all__ = [
    "Budget",
    "Clock",
    "Periodic",
    "Schedule",
    "check_states",
    "load_states",
    "make_schedules",
    "run_scheduled",
    "states_of",
]

#: Seconds, one number for each batch of a stream.
Times = Sequence[float] | npt.NDArray[np.float64]

#: Batches after which a method that was too slow is tried again, at most.
_LONGEST_WAIT = 64.0
#: Rounding of times that are sums.
_SLACK = 1e-9


class Schedule(ABC):
    """Decides for each batch whether the method adapts to it. Its numbers are part of the engine's state."""

    #: Whether it depends on how long a batch takes.
    measures = False

    def describe(self) -> dict[str, Any]:
        """Return the settings that are saved with a result."""
        return {}

    def state(self) -> dict[str, float]:
        """Return the numbers that later decisions depend on."""
        return {}

    def load(self, state: dict[str, float]) -> None:  # noqa: B027
        """Continue from what ``state()`` returned, or begin where that is empty."""

    def check(self, state: Any) -> None:
        """Check a state that comes from a file.

        Args:
            state: The state; None if the file has none.

        Raises:
            ValueError: If it is not a state of this schedule.
        """
        form = dict.fromkeys(self.state(), Between(0.0, 1e15))
        fault = None if state is None else difference(form, state, type(self).__name__, whole=True)
        if fault is not None:
            raise InputError(fault)

    def arrive(self, index: int) -> None:  # noqa: B027
        """Note the number of the coming batch in its stream."""

    @abstractmethod
    def adapts(self, batch: int, images: int) -> bool:
        """Return whether the method adapts to a batch.

        Args:
            batch: Number of the batch in its visit.
            images: Images in it.
        """

    def note(self, images: int, adapted: bool, seconds: float) -> None:  # noqa: B027
        """Note how a batch was treated, and how long it took.

        Args:
            images: Images in it.
            adapted: Whether it was adapted to.
            seconds: Time that it took; 0 unless a schedule ``measures``.
        """


class Periodic(Schedule):
    """Adapts to the first of every ``every`` batches of a visit.

    Args:
        every: Number of batches, at least 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def describe(self) -> dict[str, Any]:
        """Return the number of batches."""
        return {"adapt_every": self.every}

    def adapts(self, batch: int, images: int) -> bool:
        """Return whether the batch is the first of its group."""
        return batch % self.every == 0


class Budget(Schedule):
    """Adapts to a batch if that is expected to take no more than a limit.

    The expected time is that of a prediction plus the time that adaptation adds to it, both as running means per image.
    A method that was too slow is tried again after 2, 4, 8, ... and at most 64 batches.

    Args:
        milliseconds: Limit for a batch, in milliseconds.
    """

    measures = True

    def __init__(self, milliseconds: float) -> None:
        self.limit = milliseconds / 1000
        #: Seconds of an image: its prediction, and what adaptation adds. 0 before they are known.
        self.predicting = self.adapting = 0.0
        #: Batches since the last adaptation, and after which it is tried again.
        self.skipped, self.patience = 0.0, 1.0

    def describe(self) -> dict[str, Any]:
        """Return the limit."""
        return {"max_milliseconds": 1000 * self.limit}

    def state(self) -> dict[str, float]:
        """Return the means and the counts."""
        names = ("predicting", "adapting", "skipped", "patience")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, float]) -> None:
        """Continue from what ``state()`` returned."""
        for name, value in (state or Budget(1000 * self.limit).state()).items():
            setattr(self, name, value)

    def adapts(self, batch: int, images: int) -> bool:
        """Return whether the batch is expected to keep the limit, or the method is due for another trial."""
        return images * (self.predicting + self.adapting) <= self.limit or self.skipped >= self.patience

    def note(self, images: int, adapted: bool, seconds: float) -> None:
        """Note the time of a batch."""
        if not adapted:
            self.predicting = _mean(self.predicting, seconds / images)
            self.skipped += 1
            return
        self.adapting = _mean(self.adapting, max(seconds / images - self.predicting, 0.0))
        self.skipped = 0.0
        self.patience = 1.0 if seconds <= self.limit else min(2 * self.patience, _LONGEST_WAIT)


class Clock(Schedule):
    """Adapts to a batch if the method is done with the earlier ones when it arrives.

    M. Alfarra, H. Itani, A. Pardo, S. Alhuwaider, M. Ramazanova, J. C. Pérez, Z. Cai, M. Müller and B. Ghanem,
    *Evaluation of Test-Time Adaptation Under Computational Time Constraints*, ICML 2024, arXiv 2304.04795. A batch that
    is missed is predicted by the last adapted model, beside the adaptation in progress, and costs nothing.

    Args:
        arrivals: Time at which each batch is complete, in seconds.
        costs: Seconds that adaptation to each batch takes; None measures them.
    """

    def __init__(self, arrivals: Times, costs: Times | None = None) -> None:
        self.arrivals, self.costs = arrivals, costs
        self.measures = costs is None
        self.index = 0
        #: Time of the present batch, and the one at which the method is done.
        self.now = self.free = 0.0

    def state(self) -> dict[str, float]:
        """Return the time at which the method is done, in seconds."""
        return {"free": self.free}

    def load(self, state: dict[str, float]) -> None:
        """Continue from what ``state()`` returned."""
        self.free = state.get("free", 0.0)

    def arrive(self, index: int) -> None:
        """Set the clock to the arrival of a batch."""
        self.index, self.now = index, float(self.arrivals[index])

    def adapts(self, batch: int, images: int) -> bool:
        """Return whether the method is done when the batch arrives."""
        return self.free <= self.now * (1 + _SLACK)

    def note(self, images: int, adapted: bool, seconds: float) -> None:
        """Note until when the method is busy."""
        if adapted:
            self.free = self.now + (seconds if self.costs is None else float(self.costs[self.index]))


def make_schedules(adapt_every: int, max_milliseconds: float | None) -> list[Schedule]:
    """Return the schedules that a method's arguments ask for.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not (type(adapt_every) is int and adapt_every >= 1):
        raise InputError(f"adapt_every must be a number of batches >= 1, got {adapt_every!r:.60}")
    if max_milliseconds is not None and not 0 < max_milliseconds < float("inf"):
        raise InputError(f"max_milliseconds must be positive, or None for no limit, got {max_milliseconds!r:.60}")
    periodic: list[Schedule] = [Periodic(adapt_every)] if adapt_every > 1 else []
    return periodic if max_milliseconds is None else [*periodic, Budget(max_milliseconds)]


def states_of(schedules: Sequence[Schedule]) -> dict[str, dict[str, float]]:
    """Return the numbers that later decisions of schedules depend on."""
    return {type(schedule).__name__: schedule.state() for schedule in schedules}


def load_states(schedules: Sequence[Schedule], states: dict[str, dict[str, float]]) -> None:
    """Continue from what ``states_of`` returned. A schedule that it lacks begins."""
    for schedule in schedules:
        schedule.load(states.get(type(schedule).__name__, {}))


def check_states(schedules: Sequence[Schedule], states: dict[str, Any]) -> None:
    """Check states that come from a file.

    Raises:
        ValueError: If one is not a state of its schedule.
    """
    for schedule in schedules:
        schedule.check(states.get(type(schedule).__name__))


class _Engine(Protocol):
    net: Any
    method: Any
    schedules: list[Schedule]
    is_missed: bool

    def __call__(self, images: Tensor, call: Call | None = None, adapt: bool = True) -> Any: ...
    def predict(self, images: Tensor, call: Call | None = None) -> Any: ...


def run_scheduled(engine: _Engine, images: Tensor, call: Call | None = None, adapt: bool = True) -> Any:
    """Adapt to a batch if all schedules of an engine agree, otherwise predict it; see ``Engine.__call__``."""
    net, schedules = engine.net, engine.schedules
    if not (adapt and schedules):
        return engine(images, call, adapt)
    adapts = all(schedule.adapts(net.counters.batch, len(images)) for schedule in schedules)
    measures = any(schedule.measures for schedule in schedules)
    began = _time(images) if measures else 0.0
    if adapts:
        output = engine(images, call)
    else:
        output = engine.predict(images, call)
        net.counters.batch += 1
        net.counters.missed += 1
        net.forwards += 1
        net.last = {}
        net.readings = {steps: logits_of(output, net.output) for steps in engine.method.read_at}
    seconds = _time(images) - began if measures else 0.0
    for schedule in schedules:
        schedule.note(len(images), adapts, seconds)
    engine.is_missed = not adapts
    return output


def _time(images: Tensor) -> float:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def _mean(before: float, value: float) -> float:
    return value if before == 0 else (before + value) / 2
