"""Checkpoints of an adaptation, from which a stopped one resumes in the middle of its stream."""

from __future__ import annotations

import json
import reprlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ttalight.adapters import Adapter
from ttalight.callbacks.adaptation_files import FOLDER, check_resumable, list_checkpoints, read_last, write_checkpoint
from ttalight.callbacks.adaptation_validation import check_recorded, check_states, read_identity
from ttalight.callbacks.event_files import cut_back, event_sizes
from ttalight.callbacks.recorder import Recorder
from ttalight.callbacks.run_results import source_of
from ttalight.callbacks.search import get_callback
from ttalight.data import ImageDataModule
from ttalight.data.streams import Stream
from ttalight.errors import InputError
from ttalight.seeding import global_seed

__all__ = ["AdaptationCheckpoint"]

#: Up to so many visits there is a checkpoint at the end of each; beyond, as often as writing takes a twentieth of the
#: time.
_VISITS_WRITTEN_EACH = 100


@dataclass(frozen=True)
class _Run:
    """The run in progress, and what tells it from others."""

    folder: Path
    adapter: Adapter
    recorder: Recorder
    stream: Stream
    identity: dict[str, Any]


class AdaptationCheckpoint(Callback):
    """Writes checkpoints of an adaptation while ``Trainer.adapt`` runs, and resumes it from the last of them.

    A checkpoint, ``adaptation/batch-<k>-<digest>.ckpt`` in the run's folder, holds all that the batches from number k
    on depend on: the adapter's engine, the recorder, PyTorch's random states, and how far predictions and TensorBoard
    events had come. On the CPU a resumed run gives the numbers of an uninterrupted one, bit for bit. The last two are
    kept; all are removed when the run is over. ``Trainer.adapt`` adds this callback unless the callbacks have one.
    In ``fit``, ``test`` and ``predict`` it does nothing, nor for a data module without a stream.

    Args:
        every: Batches between two checkpoints; by default ``seconds`` decide.
        seconds: Time between two checkpoints, or twenty times what writing one takes, if that is more. There is one
            more at the end of each visit of a domain, and one when a SIGTERM has arrived.

    Raises:
        ValueError: If an argument is not positive.
    """

    def __init__(self, every: int | None = None, seconds: float = 60.0) -> None:
        if every is not None and every < 1:
            raise InputError(f"every must be at least 1, or None, got {every}")
        if not seconds > 0:
            raise InputError(f"seconds must be positive, got {seconds}")
        self.every = every
        self.seconds = seconds
        self._begun = False
        self._resume: Path | None = None
        self._checkpoint: dict[str, Any] | None = None
        self._run: _Run | None = None
        self._batches = self._visits = 0
        self._written = self._writing = 0.0

    # -- what Trainer.adapt calls

    def begin(self, resume: str | None) -> None:
        """Be active in the coming run.

        Args:
            resume: Folder of the run to resume. None begins a new one.

        Raises:
            ValueError: If there is no run in that folder, it is complete, or all its checkpoints are damaged.
        """
        self._begun, self._checkpoint = True, None
        self._resume = None if resume is None else Path(resume)
        if self._resume is not None:
            check_resumable(self._resume)
            self._checkpoint = read_last(self._resume)

    def end(self, data: object) -> None:
        """Be inert again, whatever became of the run.

        Args:
            data: The data module of the run.
        """
        if self._run is not None:
            self._run.adapter.resume(None)
            self._run.recorder.resume(None)
        if isinstance(data, ImageDataModule):
            data.start_batch = 0
        self._begun, self._checkpoint, self._run = False, None, None

    # -- the beginning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pass the checkpoint to the adapter, the recorder and the data module if it belongs to this run."""
        if not self._begun:
            return
        adapter, recorder = get_callback(trainer, Adapter), get_callback(trainer, Recorder)
        folder, data = recorder.run_folder(trainer), getattr(trainer, "datamodule", None)
        if folder is None or not isinstance(data, ImageDataModule) or data.stream is None:
            if self._resume is not None:
                raise InputError(
                    "a run is resumed in its folder, on the stream of its data module: this one has "
                    + ("no folder" if folder is None else f"no stream, its data module is a {type(data).__name__}")
                )
            return
        if self._resume is not None and self._resume.resolve() != Path(folder).resolve():
            raise InputError(
                f"the run to resume is in {self._resume}, and this one writes to {Path(folder)}: use "
                f"Trainer(default_root_dir={str(self._resume)!r})"
            )
        identity = _identity(trainer, pl_module, adapter, recorder, data)
        self._run = _Run(Path(folder), adapter, recorder, data.stream, identity)
        if self._resume is not None:
            self._hand_out(self._run, trainer, data)

    def _hand_out(self, run: _Run, trainer: Trainer, data: ImageDataModule) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None:
            rank_zero_info(f"{run.folder} has no checkpoint of its adaptation yet: it starts with the first batch")
            _cut_back_events(trainer, None)
            return
        _check_checkpoint(checkpoint, run)
        run.adapter.resume(checkpoint["adapter"])
        run.recorder.resume(checkpoint["recorder"])
        data.start_batch = checkpoint["batches"]
        rank_zero_info(f"{run.folder} continues with batch {checkpoint['batches']}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the events that come after the checkpoint."""
        if self._run is None:
            return
        checkpoint, self._checkpoint = self._checkpoint, None
        self._batches = checkpoint["batches"] if checkpoint is not None else 0
        if checkpoint is not None:
            _cut_back_events(trainer, checkpoint)  # hyper-parameters were logged again, and are there already
            _set_random_states(checkpoint["random"])
        self._visits = self._run.recorder.closed_visits
        self._written, self._writing = time.perf_counter(), 0.0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove checkpoints after this one, and those of an earlier run, once all callbacks have started."""
        for batches, path in list_checkpoints(self._run.folder) if self._run is not None else ():
            if trainer.is_global_zero and batches > self._batches:
                path.unlink(missing_ok=True)

    # -- on the way

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a checkpoint where one is due."""
        done = batch_idx + 1
        if self._run is None or done >= self._run.stream.batches:
            return
        ends = trainer.received_sigterm
        if trainer.is_global_zero and (self._is_due(done, self._run.recorder.closed_visits) or ends):
            self._write(self._run, trainer, done)
        if ends:
            trainer.strategy.barrier("checkpoint")  # a process that ends first may take the others with it

    def _is_due(self, done: int, visits: int) -> bool:
        visit_ends, self._visits = visits > self._visits, visits
        if (self.every is not None and done % self.every == 0) or (visit_ends and visits <= _VISITS_WRITTEN_EACH):
            return True
        since = time.perf_counter() - self._written
        affordable = since >= 20 * self._writing
        return affordable and (visit_ends or (self.every is None and since >= self.seconds))

    def _write(self, run: _Run, trainer: Trainer, done: int) -> None:
        began = time.perf_counter()
        engine = run.adapter.engine
        assert engine is not None, "an adapter has an engine while a run lasts"
        checkpoint = {
            "identity": json.dumps(run.identity),
            "batches": done,
            "adapter": engine.capture(),
            "recorder": run.recorder.run_state(),
            "events": {name: event_sizes(logger) for name, logger in _tensorboards(trainer).items()},
            "random": _random_states(),
        }
        write_checkpoint(run.folder, done, checkpoint)
        self._batches = done
        self._written = time.perf_counter()
        self._writing = self._written - began

    # -- the end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the checkpoints away: the run is over."""
        if self._run is not None and trainer.is_global_zero:
            shutil.rmtree(self._run.folder / FOLDER, ignore_errors=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log how to resume."""
        if self._run is not None and list_checkpoints(self._run.folder):
            rank_zero_info(
                f"The run stopped; it can be resumed from batch {self._batches}: ttalight adapt --resume "
                f"{self._run.folder}"
            )


def _identity(
    trainer: Trainer, module: LightningModule, adapter: Adapter, recorder: Recorder, data: ImageDataModule
) -> dict[str, Any]:
    """Return what must be equal for a checkpoint to be one of this run, as plain values."""
    stream = data.stream
    assert stream is not None
    identity = {
        "model": type(module).__name__,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "source weights": (recorder.source or source_of(module))["sha256"],
        "adapter": type(adapter).__name__,
        **{f"adapter's {name}": value for name, value in adapter.protocol().items()},
        "seed": global_seed() if adapter.seed is None else adapter.seed,
        "data": type(data).__name__,
        "stream": stream.hash,
        "precision": str(trainer.precision),
        "predictions": recorder.predictions,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def _check_checkpoint(checkpoint: dict[str, Any], run: _Run) -> None:
    """Check a checkpoint but for the adapter's part, which its engine checks."""
    batches, recorder = checkpoint["batches"], run.recorder
    try:
        _check_identity(read_identity(checkpoint["identity"]), run)
        check_states(checkpoint["random"], checkpoint["events"])
        every_label = recorder.ignore_index is None
        check_recorded(
            checkpoint["recorder"], batches, run.stream, run.adapter.read_at, recorder.predictions, every_label
        )
    except ValueError as error:
        raise InputError(f"the checkpoint of batch {batches} in {run.folder / FOLDER} {error}") from None


def _check_identity(saved: dict[str, Any], run: _Run) -> None:
    own = run.identity
    differing = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if differing:
        listing = "; ".join(
            f"{name:.60}: there {_shown(saved.get(name))}, here {_shown(own.get(name))}" for name in differing[:8]
        )
        raise InputError(
            f"is of another run ({listing}): resume with the configuration in {run.folder}/config.yaml, or give the "
            "new run a folder of its own"
        )


def _shown(value: Any) -> str:
    return value[:80] if isinstance(value, str) else reprlib.repr(value)


@rank_zero_only
def _cut_back_events(trainer: Trainer, checkpoint: dict[str, Any] | None) -> None:
    for name, logger in _tensorboards(trainer).items():
        cut_back(logger, None if checkpoint is None else checkpoint["events"].get(name, {}))


def _tensorboards(trainer: Trainer) -> dict[str, TensorBoardLogger]:
    return {str(i): logger for i, logger in enumerate(trainer.loggers) if isinstance(logger, TensorBoardLogger)}


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
