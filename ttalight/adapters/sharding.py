"""Checks of runs in several processes. ``data.streams.partition`` and ``models.passes.batch_shard`` divide them."""

from __future__ import annotations

from typing import Literal

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from ttalight.errors import InputError

__all__ = ["Shard", "check_sharding"]

#: ``domain``: each process adapts to domains of its own. ``batch``: all adapt to every batch together.
Shard = Literal["domain", "batch"]


def check_sharding(trainer: Trainer, shard: Shard | None, reset: object) -> None:
    """Check that the processes of a run give what one process gives.

    Raises:
        ValueError: If a process would not see whole parameters, it is not said how to divide the run, the data module
            has no stream to divide, or the method's ``reset`` lets one domain depend on another.
    """
    strategy, ranks = trainer.strategy, trainer.world_size
    name = type(strategy).__name__
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise InputError(
            f"{name} keeps pieces of the parameters in each process, but adaptation snapshots, resets and updates "
            "whole ones: use strategy='ddp' (trainer.strategy: ddp)"
        )
    if ranks == 1:
        return
    if not isinstance(strategy, DDPStrategy):
        raise InputError(
            f"adaptation in {ranks} processes runs under DDP, got {name}: use strategy='ddp' or 'ddp_spawn'"
        )
    if shard is None:
        raise InputError(
            f"adaptation in {ranks} processes must know how to divide them: shard='domain' or shard='batch' of "
            "Trainer.adapt (--shard domain, --shard batch); or set devices=1 (trainer.devices: 1)"
        )
    data = getattr(trainer, "datamodule", None)
    if getattr(data, "stream", None) is None:
        raise InputError(
            f"shard={shard!r} divides the stream of a data module, and {type(data).__name__} has none: use an "
            "ImageDataModule of ttalight.data, or one process (devices=1)"
        )
    if shard == "domain" and reset not in ("domain", "batch"):
        raise InputError(
            f"shard='domain' needs a method that starts every domain from the source, got reset={reset!r}: what one "
            "process learned on earlier domains the others would not know. Set reset='domain', or use shard='batch'"
        )
