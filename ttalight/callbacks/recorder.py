"""Measures an evaluation and keeps its result file up to date."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ttalight.adapters import Adapter
from ttalight.callbacks.agreement import source_agreement
from ttalight.callbacks.logs import flush_loggers, log_batch, log_results
from ttalight.callbacks.measurement import Batch, Measurement
from ttalight.callbacks.rank_files import RankFiles
from ttalight.callbacks.run_results import Passes, build_results
from ttalight.callbacks.search import find_callback
from ttalight.data.streams import Stream
from ttalight.engine import Engine
from ttalight.errors import InputError, InputTypeError, UsageError
from ttalight.labels import UNLABELLED
from ttalight.models.outputs import Select, logits_of
from ttalight.reporting import PredictionWriter, Results, Source, write_results
from ttalight.reporting.predictions import PREDICTIONS, check_parts, merge_predictions

__all__ = ["Recorder"]

_WRITTEN = ("results.json", "domains.csv", PREDICTIONS)
_SEVERAL = (
    "several processes evaluate without an adapter that says how they divide the data: nothing is recorded. Evaluate "
    "in one process (devices=1), or adapt with shard='domain' or shard='batch' (Source adapts nothing)"
)
#: Up to so many rows the results are written after each of them; beyond, as often as writing takes a twentieth of the
#: time, so that a stream of 100,000 visits does not spend its time on writing.
_ROWS_WRITTEN_EACH = 100


class Recorder(Callback):
    """Records the predictions of any LightningModule during ``test`` and ``validate``, adapted or not.

    It reads the logits that ``self(images)`` returns inside the step and the labels of the batch, ``(image, label)``.
    One row a visit of the stream; without a stream, one a data loader. ``stream.npz``, the stream itself, is written to
    the run's folder at the start, ``results.json`` and ``domains.csv`` after every visit, and loggers get online
    accuracy and entropy a batch, the adapter's loss, gradient norm and fraction of kept samples, and each domain's
    accuracy. Images whose labels are all ``UNLABELLED`` have no accuracy. Their rows have the agreement with the source
    model instead, which takes a second pass.

    Args:
        folder: Where the result files go; the trainer's log directory by default, none if it has none.
        predictions: Write ``predictions.npz`` as well: position, domain, label, prediction and logits of every image.
        ignore_index: Label of pixels that do not count, for dense predictions; by default the ``ignore_index`` of the
            module or else of the data module, where these have one.
    """

    def __init__(self, folder: str | None = None, predictions: bool = False, ignore_index: int | None = None) -> None:
        self.folder = folder
        self.predictions = predictions
        self.ignore_index = ignore_index
        #: The results of the last evaluation.
        self.results: Results | None = None
        #: Where the weights come from, if it is not the module that says it; ``Trainer.adapt`` sets it.
        self.source: Source | None = None
        #: What a progress bar may show: the domain and the running accuracy in it.
        self.status: dict[str, str] = {}
        self._active = False
        self._ignored: int | None = None
        self._hook: RemovableHandle | None = None
        self._writer: PredictionWriter | None = None
        self._resumed: dict[str, Any] | None = None
        self._predicted: dict[str, Any] | None = None
        self._checkpointed = False
        self._ranks: RankFiles | None = None
        self._folder: str | None = None
        #: The predictions of the whole evaluation, which are in their archive.
        self._finished: PredictionWriter | None = None
        #: Whether the results of the whole evaluation are computed and not yet written.
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Disable the recorder in ``fit``, and in several processes without an adapter that divides the data."""
        self._active = stage in ("test", "validate")
        adapter = find_callback(trainer, Adapter)
        if self._active and trainer.world_size > 1 and (adapter is None or adapter.shard is None):
            rank_zero_warn(_SEVERAL)
            self._active, self.results = False, None

    # -- one evaluation

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._active:
            return
        self.results, self.status, self._ended, self._finished, self._ranks = None, {}, False, None, None
        data = None if trainer.validating else getattr(trainer, "datamodule", None)
        stream: Stream | None = getattr(data, "stream", None)
        folder = self._folder = self.run_folder(trainer)
        self._ignored = self.ignore_index if self.ignore_index is not None else _ignore_index(trainer, module)
        self._measurement = Measurement(stream, self._ignored, getattr(data, "share", None))
        self._logits: Tensor | None = None
        self._engine: Engine | None = None
        self._output: Select = None
        self._written, self._writing = time.perf_counter(), 0.0
        state, self._resumed = self._resumed, None
        self._predicted, self._checkpointed = None if state is None else state["predictions"], state is not None
        if state is not None:
            self._measurement.load_state_dict(state["measurement"], module.device)
        if self.predictions and folder is None:
            raise InputError("predictions=True needs a place to write to: give the Recorder a folder, or a logger")
        if self._measurement.share is not None and folder is None:
            raise InputError(
                "shard='domain' needs a place where processes leave what they measured: give the Trainer a "
                "default_root_dir, or the Recorder a folder"
            )
        if self._predicted is not None and self.predictions and folder is not None:
            check_parts(folder, self._predicted)  # before anything is changed
        self._hook = module.register_forward_hook(self._see)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _begin(self, trainer: Trainer) -> None:
        """Replace the files of an earlier run: beside this one's they would pass for its results."""
        if not self._active or self._folder is None:
            return
        folder, share = Path(self._folder), self._measurement.share
        if trainer.is_global_zero:
            for name in () if self._checkpointed else _WRITTEN:
                (folder / name).unlink(missing_ok=True)
            if self._measurement.stream is not None:
                self._measurement.stream.save(folder / "stream.npz")
        self._ranks = RankFiles(folder, trainer) if share is not None else None
        if self.predictions and (share is not None or trainer.is_global_zero):
            place = folder if self._ranks is None else self._ranks.predictions
            self._writer = PredictionWriter(place, self._predicted)

    def run_folder(self, trainer: Trainer) -> str | None:
        """Return the folder that the result files go to, None if there is none; all processes have to ask together."""
        # Without a logger Lightning's log directory is the current one, where no files are expected.
        given = trainer.loggers or Path(trainer.default_root_dir) != Path.cwd()
        return self.folder or (trainer.log_dir if given else None)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._logits = logits_of(output, self._output)

    def _batch_start(self) -> None:
        self._logits = None
        self._began = time.perf_counter()

    def _batch_end(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, loader: int) -> None:
        if not self._active:
            return
        labels = _labels(batch)
        if self._logits is None:
            raise UsageError(
                f"the step of {type(module).__name__} does not call self(images), so its predictions cannot be "
                "recorded: let it call self(images), or remove the Recorder from the callbacks"
            )
        adapter, measurement = find_callback(trainer, Adapter), self._measurement
        self._engine = adapter.engine if adapter is not None else None
        readings = self._engine.net.readings if self._engine is not None else {}
        seen = measurement.add(batch_idx, loader, self._logits.detach(), labels, readings, self._began)
        if self._engine is not None and self._engine.is_missed:
            measurement.missed.append(batch_idx)
        if self._engine is not None and not seen.labelled:
            agreed = source_agreement(self._engine, batch[0], self._logits.detach())
            measurement.add_agreement(seen, agreed[measurement.scored(batch_idx)].cpu().numpy())
        self._save(seen, batch_idx, labels)
        log_batch(trainer, adapter, seen, measurement.batches)
        self.status = measurement.status(int(seen.visit[-1]), seen.labelled)
        if measurement.unwritten and self._is_due():
            self._write_progress(trainer)

    def _save(self, seen: Batch, batch_idx: int, labels: Tensor) -> None:
        if self._writer is None:
            return
        assert self._logits is not None
        scored = self._measurement.scored(batch_idx)
        logits = self._logits.detach()[scored]
        self._writer.add(
            position=seen.position,
            visit=seen.visit,
            domain=self._measurement.domains(seen.visit),
            sample=seen.sample,
            label=labels[scored].cpu().numpy(),
            prediction=logits.argmax(dim=1).cpu().numpy(),
            logits=logits.float().cpu().numpy(),
        )

    def _is_due(self) -> bool:
        few = self._measurement.begun <= _ROWS_WRITTEN_EACH
        return few or time.perf_counter() - self._written >= 20 * self._writing

    def _stop(self, trainer: Trainer) -> None:
        """Compute the results and log them; they are written when the evaluation ends."""
        if not self._active or self._hook is None:
            return
        if self._ranks is not None:
            self._finish_together(trainer, self._ranks)
        else:
            self._measurement.close_all()
            self._finished = self._writer
            self._close_predictions(keep_parts=True)
            self.results = self._build(trainer, self._measurement, self._passes(), self._measurement.complete)
        self._ended = True
        assert self.results is not None
        log_results(trainer, self.results)

    def _end(self, trainer: Trainer) -> None:
        """Write the results, and remove the files that only a run in progress needs.

        Results that are marked complete are written last: all other files, curves included, are complete then.
        """
        self._remove_hook()
        if not self._ended:
            return
        self._ended = False
        assert self.results is not None
        flush_loggers(trainer)
        if self._folder is not None and trainer.is_global_zero:
            write_results(self._folder, self.results)
            if self._ranks is not None:
                self._ranks.discard()
        if self._finished is not None:
            self._finished.discard()
            self._finished = None

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _write_progress(self, trainer: Trainer) -> None:
        """Write the domains that are finished."""
        began = time.perf_counter()
        if self._ranks is None:
            self.results = self._build(trainer, self._measurement, self._passes(), complete=False)
            if self._folder is not None and trainer.is_global_zero:
                write_results(self._folder, self.results)
            self._note_writing(began)
            return
        self._write_part(self._ranks)
        if trainer.node_rank == 0:  # the others cannot be sure of what they see of its files
            whole, cost = self._merged(list(self._ranks.read().values()))
            self.results = self._build(trainer, whole, cost, complete=False)
            assert self._folder is not None, "processes that have parts leave them in the run's folder"
            write_results(self._folder, self.results)
        self._note_writing(began)

    def _note_writing(self, began: float) -> None:
        self._measurement.unwritten = 0
        self._written = time.perf_counter()
        self._writing = self._written - began

    # -- several processes, each with domains of its own

    def _write_part(self, ranks: RankFiles) -> None:
        ranks.write({"measurement": self._measurement.part(), "cost": list(self._passes())})

    def _merged(self, parts: list[dict[str, Any]]) -> tuple[Measurement, Passes]:
        stream = self._measurement.stream
        assert stream is not None, "only a stream is divided"
        whole = Measurement.merged(stream, self._ignored, [part["measurement"] for part in parts])
        return whole, Passes.merged([Passes(*part["cost"]) for part in parts])

    def _finish_together(self, trainer: Trainer, ranks: RankFiles) -> None:
        self._close_predictions()
        self._write_part(ranks)
        ranks.wait(trainer)
        if trainer.is_global_zero:
            whole, cost = self._merged(ranks.read_all())
            whole.close_all()
            if self.predictions:
                merge_predictions(ranks.folder.parent, ranks.prediction_files(), whole.domain_names())
            self.results = self._build(trainer, whole, cost, whole.complete)
        self.results = trainer.strategy.broadcast(self.results)

    def _close_predictions(self, keep_parts: bool = False) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close(self._measurement.domain_names(), keep_parts)

    def ends_everywhere(self, ends: bool) -> bool:
        """Return whether any process of a divided run is to end, and tell the others that this one is."""
        return self._ranks.ends_everywhere(ends) if self._ranks is not None else ends

    # -- what a resumed run needs

    @property
    def closed_visits(self) -> int:
        """Number of visits of the stream that are over."""
        return len(self._measurement.metrics.closed)

    def run_state(self) -> dict[str, Any]:
        """Return what was recorded so far, tensors and plain values only; predictions stay in files of their own."""
        self._checkpointed = True
        return {
            "measurement": self._measurement.state_dict(),
            "predictions": self._writer.state() if self._writer is not None else None,
        }

    def resume(self, state: dict[str, Any] | None) -> None:
        """Continue the next evaluation from what ``run_state()`` returned. None starts a new one."""
        self._resumed = state

    def _passes(self) -> Passes:
        return Passes.of(self._engine, self._measurement)

    def _build(self, trainer: Trainer, measurement: Measurement, passes: Passes, complete: bool) -> Results:
        return build_results(trainer, find_callback(trainer, Adapter), measurement, passes, complete, self.source)

    # -- Lightning

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready to record."""
        adapter = find_callback(trainer, Adapter)
        self._output = None if adapter is None else adapter.output
        self._start(trainer, pl_module)

    on_validation_start = on_test_start

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace an earlier run, now that all callbacks have started."""
        self._begin(trainer)

    on_validation_epoch_start = on_test_epoch_start

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note when the batch began."""
        self._batch_start()

    on_validation_batch_start = on_test_batch_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the batch."""
        self._batch_end(trainer, pl_module, batch, batch_idx, dataloader_idx)

    on_validation_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results."""
        self._stop(trainer)

    on_validation_epoch_end = on_test_epoch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results, and remove the forward hook."""
        self._end(trainer)

    on_validation_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the finished domains, and remove the forward hook."""
        if self._hook is None:
            return
        self._remove_hook()
        try:
            if not self._ended and self._measurement.unwritten:
                self._write_progress(trainer)
            self._end(trainer)
            self._close_predictions(keep_parts=self._checkpointed)
        except OSError as error:  # what stopped the run is more important
            warnings.warn(str(error), stacklevel=2)
        if trainer.world_size > 1:
            warnings.warn(
                f"process {trainer.global_rank} of {trainer.world_size} stopped the run "
                f"({type(exception).__name__}: {exception}); finished domains are in {self._folder}",
                stacklevel=2,
            )


def _ignore_index(trainer: Trainer, module: LightningModule) -> int | None:
    """Return the label of pixels that do not count, as the module or the data module has it; None if neither does."""
    found: Any = getattr(module, "ignore_index", getattr(getattr(trainer, "datamodule", None), "ignore_index", None))
    return found if isinstance(found, int) else None


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise InputTypeError(
        f"the recorder reads batches (image, label), got {type(batch).__name__}: let the data loader yield such pairs "
        f"(label {UNLABELLED} for images without one), or remove the Recorder from the callbacks"
    )
