"""Lightning's Trainer with one more verb: adapt."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Any

import lightning
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ttalight.adapters import Adapter
from ttalight.adapters.sharding import Shard
from ttalight.batch_norm_sync import BatchNormSync
from ttalight.callbacks import AdaptationCheckpoint, Progress, Recorder
from ttalight.checkpoint_files import CheckpointFiles
from ttalight.data import ImageDataModule
from ttalight.reporting import Results, read_results

__all__ = ["Trainer"]


class Trainer(lightning.Trainer):
    """Lightning's Trainer, which records evaluations and can adapt a model to the stream it is evaluated on.

    Unless the callbacks have their own, it adds a ``Recorder``, a progress bar, and a checkpoint callback that keeps
    ``checkpoints/last.ckpt`` as of the end of every epoch.

    Args:
        default_root_dir: Folder of the run: everything but the files of other loggers than the default one is written
            there, without version folders. By default Lightning's own folders are used.
        callbacks: As Lightning's.
        logger: As Lightning's; TensorBoard in the run's folder by default.
        sync_batchnorm: Whether BatchNorm layers normalise with the statistics of all processes in ``fit``, on any
            device; see ``BatchNormSync``.
        kwargs: As Lightning's.
    """

    def __init__(
        self,
        *,
        default_root_dir: str | None = None,
        callbacks: list[Callback] | Callback | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        sync_batchnorm: bool = True,
        **kwargs: Any,
    ) -> None:
        if sync_batchnorm:
            kwargs["plugins"] = _with_batch_norm_sync(kwargs.get("plugins"))
        chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])

        def lacks(kind: type[Callback]) -> bool:
            return not any(isinstance(callback, kind) for callback in chosen)

        if lacks(Recorder):
            chosen.insert(0, Recorder())  # before the progress bar that shows what it knows
        if enable_progress_bar is not False and lacks(ProgressBar):
            chosen.append(Progress())
        if enable_checkpointing is not False and lacks(ModelCheckpoint) and not kwargs.get("fast_dev_run"):
            chosen.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False))
        if default_root_dir is not None and logger in (None, True):
            logger = TensorBoardLogger(save_dir=default_root_dir, name="", version="")
        self._folder = default_root_dir
        super().__init__(
            default_root_dir=default_root_dir,
            callbacks=chosen,
            logger=logger,
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            **kwargs,
        )
        for callback in self.checkpoint_callbacks:
            if default_root_dir is not None and isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(default_root_dir, "checkpoints")
        self._checkpoints = enable_checkpointing is not False and not kwargs.get("fast_dev_run")
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody asked for another
            self.strategy.checkpoint_io = CheckpointFiles()

    @property
    def log_dir(self) -> str | None:
        """The folder of the run; without ``default_root_dir`` Lightning's, which the first logger decides."""
        return self._folder if self._folder is not None else super().log_dir

    def adapt(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        adapter: Adapter | None = None,
        resume: str | None = None,
        shard: Shard | None = None,
    ) -> Results:
        """Adapt a model to a stream while measuring it.

        The module's own ``test_step`` runs on the data module's test loader, with the adapter standing in for the
        module's forward. Afterwards the model is what it was before; what adaptation changed is in
        ``adapter.state_dict()``. While it runs, ``AdaptationCheckpoint`` keeps what a stopped run needs to go on.

        Args:
            model: The module to adapt, with trained weights.
            datamodule: Delivers the stream.
            adapter: The method; by default the one that the model's ``default_adapter()`` returns.
            resume: Folder of a stopped run of the same model, data and adapter, which is also this trainer's: it goes
                on from its last checkpoint, in the middle of the stream.
            shard: How several processes divide the run, with the numbers of one: ``domain`` gives each whole domains
                (or stretches of batches with ``reset="batch"``), ``batch`` a slice of every batch. One process
                ignores it.

        Returns:
            The results, as written to ``results.json``.

        Raises:
            ValueError: If there is no model, no data or no adapter, or an adapter is among the callbacks already;
                if the run to resume is complete, or another one; if processes cannot divide the run as asked.
        """
        if model is None or datamodule is None:
            raise ValueError("adapt needs a model and a datamodule")
        if shard not in (None, "domain", "batch"):
            raise ValueError(f"shard must be 'domain', 'batch' or None, got {shard!r}")
        by_domain = shard == "domain" and self.num_devices * self.num_nodes > 1
        if by_domain and resume is not None:
            raise ValueError(
                "a run whose domains are divided among processes keeps no checkpoints to resume from: its finished "
                "domains are in results.json; start it anew, or use shard='batch' or one process"
            )
        if adapter is None:
            if not hasattr(model, "default_adapter"):
                raise ValueError(
                    f"{type(model).__name__} has no adapter of its own: give one, for example --adapter Tent "
                    "(adapter=Tent() in Python)"
                )
            adapter = model.default_adapter()  # type: ignore[operator]
        before: list[Callback] = self.callbacks  # type: ignore[has-type]
        checkpoint = next((callback for callback in before if isinstance(callback, AdaptationCheckpoint)), None)
        if checkpoint is None and (self._checkpoints or resume is not None):
            checkpoint = AdaptationCheckpoint()
        if by_domain:
            checkpoint = None
        if checkpoint is not None:
            checkpoint.begin(resume)
        others = [callback for callback in before if callback is not checkpoint]
        # A checkpoint comes when all others are done with the batch.
        self.callbacks = [adapter, *others, *([checkpoint] if checkpoint is not None else [])]
        adapter.shard = shard
        try:
            self.test(model, datamodule=datamodule, verbose=False)
        except BaseException:
            self._end_others()
            raise
        finally:
            self.callbacks, adapter.shard = before, None
            if isinstance(datamodule, ImageDataModule):
                datamodule.share = None
            if checkpoint is not None:
                checkpoint.end(datamodule)
        recorder = next(callback for callback in before if isinstance(callback, Recorder))
        if recorder.results is None:  # the processes that Lightning spawned have measured, and have ended
            folder = recorder.run_folder(self)
            if folder is None:
                raise ValueError(
                    "processes that are spawned leave their results in the run's folder: give the Trainer a "
                    "default_root_dir"
                )
            recorder.results = read_results(folder)
        return recorder.results

    def _end_others(self) -> None:
        """End the processes that this one has launched: they would wait for it."""
        launcher = self.strategy.launcher
        if launcher is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def _with_batch_norm_sync(plugins: Any) -> list[Any]:
    given = [plugins] if isinstance(plugins, str) or not isinstance(plugins, Iterable) else list(plugins)
    given = [plugin for plugin in given if plugin is not None]
    return given if any(isinstance(plugin, LayerSync) for plugin in given) else [*given, BatchNormSync()]
