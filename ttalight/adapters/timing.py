"""Streams with a clock, and schedules that need one process."""

from __future__ import annotations

from lightning import Trainer

from ttalight.data.streams import Timing
from ttalight.engine.engine import Engine
from ttalight.engine.schedule import Clock
from ttalight.errors import InputError

__all__ = ["add_clock"]


def add_clock(engine: Engine, trainer: Trainer) -> None:
    """Let an engine follow the clock of the trainer's stream, if it has one.

    Raises:
        ValueError: If several processes adapt under a clock or a limit of time: each would see times of its own.
    """
    stream = getattr(getattr(trainer, "datamodule", None), "stream", None)
    timing: Timing | None = None if trainer.validating else getattr(stream, "timing", None)
    if timing is not None:
        engine.schedules.append(Clock(timing.arrivals, timing.costs))
    if trainer.world_size > 1 and (timing is not None or any(schedule.measures for schedule in engine.schedules)):
        raise InputError(
            f"a stream with a clock, and max_milliseconds, need one process, got {trainer.world_size}: set devices=1 "
            "(trainer.devices: 1)"
        )
