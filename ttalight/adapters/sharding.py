"""How an adaptation is divided over processes, and what cannot be."""

from __future__ import annotations

from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from ttalight.data.streams import Stream
from ttalight.data.streams.shares import Places, deal, places
from ttalight.engine.engine import Engine

__all__ = ["Shard", "StreamShare", "check_strategy", "check_sharding"]

#: ``domain``: each process adapts to domains of its own. ``batch``: all adapt to every batch together.
Shard = Literal["domain", "batch"]


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which a method does not see whole parameters.

    Raises:
        ValueError: If the trainer has such a strategy.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"{type(strategy).__name__} keeps pieces of the parameters in each process, but adaptation snapshots, "
            "resets and moves whole ones: use strategy='ddp' (trainer.strategy: ddp)"
        )
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"adaptation in {trainer.world_size} processes runs under DDP, got {type(strategy).__name__}: use "
            "strategy='ddp' or 'ddp_spawn'"
        )


def check_sharding(trainer: Trainer, shard: Shard | None, reset: object) -> None:
    """Refuse what several processes cannot do as one does.

    Raises:
        ValueError: If it is not said how to divide the run, the data module has no stream to divide, or the method's
            ``reset`` lets one domain depend on another.
    """
    ranks = trainer.world_size
    if shard is None:
        raise ValueError(
            f"adaptation in {ranks} processes must know how to divide them: shard='domain' or shard='batch' of "
            "Trainer.adapt (--shard domain, --shard batch); or set devices=1 (trainer.devices: 1)"
        )
    data = getattr(trainer, "datamodule", None)
    if getattr(data, "stream", None) is None:
        raise ValueError(
            f"shard={shard!r} divides the stream of a data module, and {type(data).__name__} has none: use an "
            "ImageDataModule of ttalight.data, or one process (devices=1)"
        )
    if shard == "domain" and reset not in ("domain", "batch"):
        raise ValueError(
            f"shard='domain' needs a method that starts every domain from the source, got reset={reset!r}: "
            "what one process learned on earlier domains the others would not know. Set reset='domain', or use "
            "shard='batch'"
        )


class StreamShare:
    """One process's part of a stream, and where each of its batches stands in the whole.

    Args:
        stream: The stream.
        rank: This process.
        ranks: Number of processes.
        each_batch: Whether the method starts every batch from the source.

    Raises:
        ValueError: If the stream announces no boundaries, and domains are to be divided.
    """

    def __init__(self, stream: Stream, rank: int, ranks: int, each_batch: bool) -> None:
        #: Numbers of the batches.
        self.numbers = deal(stream, ranks, each_batch)[rank]
        self._places: Places = places(stream)
        self._last = -1

    @property
    def begins_later(self) -> bool:
        """Whether the first batch of the stream is not in this part."""
        return len(self.numbers) > 0 and int(self.numbers[0]) > 0

    def place(self, index: int) -> tuple[int, int] | None:
        """Return visit and number of a batch in the whole stream if the batch before it is in another part."""
        follows, self._last = index == self._last + 1, index
        return None if follows else (int(self._places.visit[index]), int(self._places.batch[index]))


def prepare(engine: Engine, trainer: Trainer) -> None:
    """Configures a method whose settings follow from images, by the first batch of the whole stream."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(data.first_batch()))
    with trainer.precision_plugin.forward_context():
        engine.prepare(batch[0])
