"""Lightning's Trainer with one more verb: adapt."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from ttalight.adapters import Adapter
from ttalight.adapters.sharding import Shard
from ttalight.callbacks import AdaptationCheckpoint, Progress, Recorder, ResumedCheckpoint, Termination
from ttalight.callbacks.adaptation_files import check_resumable, check_unused, finish, list_checkpoints, warn_of_results
from ttalight.callbacks.search import callbacks_of, find_callback, find_callbacks, get_callback
from ttalight.callbacks.termination import spawned
from ttalight.data import ImageDataModule
from ttalight.distributed.batch_norm_sync import BatchNormSync
from ttalight.errors import InputError, InputTypeError
from ttalight.files.checkpoints import CheckpointFiles, load_module
from ttalight.files.run_folder import (
    RUN_FILES,
    SIDE_FILES,
    UNFINISHED,
    find_files,
    hold_folder,
    holds,
    missing,
    remove,
    remove_empty,
)
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
        default_root_dir: str | Path | None = None,
        callbacks: list[Callback] | Callback | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        sync_batchnorm: bool = True,
        **kwargs: Any,
    ) -> None:
        default_root_dir = None if default_root_dir is None else os.fspath(default_root_dir)
        if sync_batchnorm:
            kwargs["plugins"] = _with_batch_norm_sync(kwargs.get("plugins"))
        chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])

        def lacks(kind: type[Callback]) -> bool:
            return not any(isinstance(callback, kind) for callback in chosen)

        if lacks(Recorder):
            chosen.insert(0, Recorder())  # before the progress bar that shows what it knows
        self._termination = Termination()
        chosen += [self._termination, ResumedCheckpoint()]
        if enable_progress_bar is not False and lacks(ProgressBar):
            chosen.append(Progress())
        if enable_checkpointing is not False and lacks(ModelCheckpoint) and not kwargs.get("fast_dev_run"):
            chosen.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False))
        if default_root_dir is not None and logger in (None, True):
            # Without Lightning's metric of -1, which would stand in the place of the results among HPARAMS.
            logger = TensorBoardLogger(save_dir=default_root_dir, name="", version="", default_hp_metric=False)
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
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # no other was given
            self.strategy.checkpoint_io = CheckpointFiles()

    @property
    def log_dir(self) -> str | None:
        """The folder of the run; without ``default_root_dir`` Lightning's, which the first logger decides."""
        return self._folder if self._folder is not None else super().log_dir

    @property
    def received_sigterm(self) -> bool:
        """Whether the run ends with this batch, because this process or another one has got SIGTERM."""
        return self._termination.ends or super().received_sigterm

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Run the full optimization routine; arguments as Lightning's."""
        with self._run_in_folder():
            super().fit(*args, **kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """Perform one evaluation epoch over the validation set; arguments as Lightning's."""
        self._warn_of_results()
        with self._run_in_folder():
            return super().validate(*args, **kwargs)

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """Perform one evaluation epoch over the test set; arguments as Lightning's."""
        self._warn_of_results()
        with self._run_in_folder():
            return super().test(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Run inference on your data; arguments as Lightning's."""
        with self._run_in_folder():
            return super().predict(*args, **kwargs)

    def adapt(
        self,
        model: LightningModule | None = None,
        datamodule: Any = None,
        adapter: Adapter | None = None,
        resume: str | None = None,
        shard: Shard | None = None,
        dataloaders: Any = None,
        weights: str | Path | None = None,
        overwrite: bool = False,
    ) -> Results:
        """Adapt a model to a stream while measuring it.

        The module's own ``test_step`` runs on the data module's test loader, with the adapter standing in for the
        module's forward. Afterwards the model is what it was before; what adaptation changed is in
        ``adapter.state_dict()``. While it runs, ``AdaptationCheckpoint`` keeps what a stopped run needs to resume, and
        no other run can use the folder.

        Args:
            model: The module to adapt, with trained weights.
            datamodule: Delivers the stream; or ``dataloaders``.
            adapter: The method; by default the one that the model's ``default_adapter()`` returns.
            resume: Folder of a stopped run of the same model, data and adapter, which is also this trainer's. It
                continues from its last checkpoint. Processes that divide domains begin with the first batch.
            shard: How several processes divide the run, with the numbers of one: ``domain`` gives each whole domains
                (or stretches of batches with ``reset="batch"``), ``batch`` a slice of every batch.
            dataloaders: Instead of a data module, one or several loaders of batches ``(image, label)``. Each is a
                domain, which is announced to the adapter. Such a run cannot be resumed.
            weights: File whose weights are loaded into the model first: a checkpoint that ``fit`` has written, or a
                state dict, with all of the model's keys and no others. Results name it with its SHA-256.
            overwrite: Replace the results of an earlier run in this trainer's folder.

        Returns:
            The results, as written to ``results.json``.

        Raises:
            ValueError: If there is no model, no data or no adapter, or an adapter is among the callbacks already;
                if the run to resume is complete, or another one; if another run uses the folder; if processes cannot
                divide the run as asked; if the weights do not fit.
            FileNotFoundError: If there is no file of weights.
            FileExistsError: If there are results in this trainer's folder already, and it is not to be overwritten.
            TypeError: If the data are neither a data module nor loaders.
        """
        data = _data_arguments(datamodule, dataloaders)
        if model is None or not data:
            raise InputError("adapt needs a model and a datamodule, or a model and dataloaders")
        _check_kinds(model, adapter, resume, shard)
        recorder = get_callback(self, Recorder)
        with self._hold_unused(overwrite or resume is not None):
            if (finished := self._finish(resume)) is not None:
                recorder.results = finished
                return finished
            recorder.source = load_module(getattr(model, "_orig_mod", model), weights)
            self._adapt(model, data, adapter, resume, shard)
        if recorder.results is None:
            recorder.results = self._spawned_results(recorder)
        return recorder.results

    def _finish(self, resume: str | None) -> Results | None:
        """Return the results of a run that was stopped when they were complete already."""
        if resume is None or Path(resume).resolve() not in self._folders():
            return None
        if self.is_global_zero:  # which may have finished it before the others look
            check_resumable(Path(resume))
        return finish(Path(resume), clean=self.is_global_zero)

    def _spawned_results(self, recorder: Recorder) -> Results:
        """Return what processes that Lightning spawned have measured, which have ended."""
        folder = recorder.run_folder(self)
        if folder is None:
            raise InputError(
                "processes that are spawned leave their results in the run's folder: give the Trainer a "
                "default_root_dir"
            )
        return read_results(folder)

    def _adapt(
        self,
        model: LightningModule,
        data: dict[str, Any],
        adapter: Adapter | None,
        resume: str | None,
        shard: Shard | None,
    ) -> None:
        by_domain = shard == "domain" and self.num_devices * self.num_nodes > 1
        if adapter is None:
            if not hasattr(model, "default_adapter"):
                raise InputError(
                    f"{type(model).__name__} has no adapter of its own: give one, for example --adapter Tent "
                    "(adapter=Tent() in Python)"
                )
            adapter = model.default_adapter()  # type: ignore[operator]
        before = callbacks_of(self)
        checkpoint = find_callback(self, AdaptationCheckpoint)
        if checkpoint is None and (self._checkpoints or resume is not None):
            checkpoint = AdaptationCheckpoint()
        if by_domain:
            checkpoint = None
            if resume is not None:
                self._check_restart(Path(resume))
        if checkpoint is not None:
            checkpoint.begin(resume)
        others = [callback for callback in before if callback is not checkpoint]
        # A checkpoint comes when all others are done with the batch.
        self.callbacks = [adapter, *others, *([checkpoint] if checkpoint is not None else [])]
        adapter.shard = shard
        datamodule = data.get("datamodule")
        if datamodule is None:
            self.datamodule = None  # that of an earlier run has no part in this one
        try:
            self.test(model, verbose=False, **data)
        except BaseException:
            self._end_others()
            raise
        finally:
            self.callbacks, adapter.shard = before, None
            get_callback(self, Recorder).source = None
            if isinstance(datamodule, ImageDataModule):
                datamodule.share = None
            if checkpoint is not None:
                checkpoint.end(datamodule)

    # -- the run's folder

    def _check_restart(self, run: Path) -> None:
        """Check that a run whose domains are divided can begin again with the first batch.

        Raises:
            ValueError: If it is not in this trainer's folder, or has checkpoints to resume from.
        """
        if run.resolve() not in self._folders():
            raise InputError(f"the run to resume is in {run}: use Trainer(default_root_dir={str(run)!r})")
        if list_checkpoints(run):
            raise InputError(
                f"the run in {run} has checkpoints, which processes that divide domains cannot resume from: use "
                "shard='batch' or one process"
            )
        rank_zero_info(f"{run} has no checkpoint, since its domains are divided: it starts with the first batch")

    def _folders(self) -> list[Path]:
        """Return the folders that a run of this trainer writes to; those that only loggers know are not among them."""
        folders = [self._folder, *(recorder.folder for recorder in find_callbacks(self, Recorder))]
        return sorted({Path(folder).resolve() for folder in folders if folder is not None and "://" not in str(folder)})

    def _log_folders(self) -> list[Path]:
        """Return the folders of loggers that Lightning numbers, which no other run writes to."""
        folders = [getattr(logger, "log_dir", None) for logger in self.loggers if self.is_global_zero]
        return [Path(folder).resolve() for folder in folders if isinstance(folder, str) and "://" not in folder]

    @contextlib.contextmanager
    def _hold_folder(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            for folder in self._folders():
                held.enter_context(hold_folder(folder, first=self.is_global_zero))
            yield

    @contextlib.contextmanager
    def _hold_unused(self, used: bool) -> Iterator[None]:
        """Hold the run's folder; unless it may be used, refuse one that has results."""
        taken = [folder for folder in self._folders() if not holds(folder)]  # the command line has asked for its own
        with self._hold_folder():
            if not used and self.is_global_zero:
                check_unused(taken)
            yield

    def _warn_of_results(self) -> None:
        """Warn where an evaluation replaces results and nothing has asked for that."""
        if self.is_global_zero:
            warn_of_results(folder for folder in self._folders() if not holds(folder))

    @contextlib.contextmanager
    def _run_in_folder(self) -> Iterator[None]:
        """Hold the run's folder while the loops run; a run that fails before it begins leaves nothing there."""
        own = self._folders() if self.is_global_zero else []
        logs = [folder for folder in self._log_folders() if folder not in own]
        made = [missing(folder) for folder in logs]

        def find(folders: list[Path], *patterns: str) -> list[Path]:
            return [path for folder in folders for path in find_files(folder, patterns)]

        with self._hold_folder():
            remove(find(own, *UNFINISHED))
            there = find([*own, *logs], *RUN_FILES, *SIDE_FILES)
            try:
                with self._termination.around(self):
                    yield
            except BaseException:
                if not (self._termination.begun or spawned(self)):
                    remove([path for path in find([*own, *logs], *RUN_FILES, *SIDE_FILES) if path not in there])
                    for folders in made:
                        remove_empty(folders)
                raise

    def _end_others(self) -> None:
        """End the processes that this one has launched: they would wait for it."""
        launcher = self.strategy.launcher
        if launcher is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def _with_batch_norm_sync(plugins: Any) -> list[Any]:
    given = [plugins] if isinstance(plugins, str) or not isinstance(plugins, Iterable) else list(plugins)
    given = [plugin for plugin in given if plugin is not None]
    return given if any(isinstance(plugin, LayerSync) for plugin in given) else [*given, BatchNormSync()]


def _check_kinds(model: Any, adapter: Any, resume: Any, shard: Any) -> None:
    """Refuse arguments of ``adapt`` of another kind."""
    if shard not in (None, "domain", "batch"):
        raise InputError(f"shard must be 'domain', 'batch' or None, got {shard!r}")
    plain = getattr(model, "_orig_mod", model)  # of a compiled one
    kinds: dict[str, tuple[Any, Any]] = {
        "model": (plain, LightningModule),
        "adapter": (adapter, Adapter),
        "resume": (resume, (str, Path)),
    }
    advice = {
        "model": "a LightningModule; a plain network adapts by Tent().wrap(network)",
        "adapter": "an adapter, for example Tent()",
        "resume": "the folder of a run",
    }
    for name, (value, kind) in kinds.items():
        if value is not None and not isinstance(value, kind):
            seen = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            raise InputTypeError(f"{name} must be {advice[name]}, got {seen}")


def _data_arguments(datamodule: Any, dataloaders: Any) -> dict[str, Any]:
    """Return the data as the arguments of Lightning's ``test``; empty if there are none."""
    given = [data for data in (datamodule, dataloaders) if data is not None]
    if len(given) > 1:
        raise InputError("adapt takes a datamodule or dataloaders, got both: leave one of them out")
    if not given:
        return {}
    data = given[0]
    if isinstance(data, LightningDataModule):
        return {"datamodule": data}
    loaders = list(_leaves(data))
    for loader in loaders or [data]:
        if isinstance(loader, (Tensor, Dataset, str, bytes)) or not loaders or not isinstance(loader, Iterable):
            kind = f"the class {loader.__name__}" if isinstance(loader, type) else f"a {type(loader).__name__}"
            raise InputTypeError(
                f"adapt takes a LightningDataModule, a DataLoader or several, got {kind if loaders else 'none'}: make "
                "one with torch.utils.data.DataLoader(dataset, batch_size=...)"
            )
    return {"dataloaders": data}


def _leaves(data: Any) -> Iterator[Any]:
    """Return what is in nested lists, tuples and dictionaries."""
    if not isinstance(data, (list, tuple, dict)):
        yield data
        return
    for part in data.values() if isinstance(data, dict) else data:
        yield from _leaves(part)
