"""Progress of a run: one bar on a terminal, one line at a time in a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ttalight.callbacks.recorder import Recorder
from ttalight.callbacks.search import find_callback
from ttalight.reporting.text import printable

__all__ = ["Progress"]

#: Seconds between two lines in a file.
_INTERVAL = 60.0


class Progress(TQDMProgressBar):
    """Lightning's progress bar, one for all epochs, with the domain and the running accuracy of an evaluation.

    Where the output goes to a file, a line is written every minute and at the end of the run.

    Args:
        refresh_rate: Batches between two refreshes; 0 switches the display off. By default every batch on a terminal,
            and lines in a file.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        super().__init__(refresh_rate=1 if refresh_rate is None else refresh_rate)
        self.writes_lines = refresh_rate is None and not sys.stdout.isatty()
        self._begun = self._written = time.monotonic()

    @property
    def is_enabled(self) -> bool:
        """Whether bars are shown."""
        return super().is_enabled and not self.writes_lines

    # -- fit: one bar

    def init_sanity_tqdm(self) -> Tqdm:
        """Return no bar."""
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar for ``validate`` only."""
        return super().init_validation_tqdm() if self.trainer.state.fn == "validate" else Tqdm(disable=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar, behind the epochs that a resumed run has made."""
        super().on_train_start()
        epochs = trainer.max_epochs or -1
        if epochs > 0 and isinstance(self.total_train_batches, int):
            self.train_progress_bar.total = epochs * self.total_train_batches
        self.train_progress_bar.initial = self.train_progress_bar.n = self._batches_done(trainer)
        self._begin()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Show the epoch."""
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        self.train_progress_bar.set_description(f"{_name(trainer)}: epoch {trainer.current_epoch + 1}{epochs}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the place in the run, and what is logged."""
        done, bar = self._batches_done(trainer), self.train_progress_bar
        if self._should_update(done, bar.total):
            bar.n = done
            bar.set_postfix(self.get_metrics(trainer, pl_module))
        self._write(trainer, f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar, or write the last line."""
        super().on_train_end()
        self._write(trainer, f"{trainer.current_epoch} epochs", pl_module, is_last=True)

    # -- evaluations

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar."""
        super().on_test_start(trainer, pl_module)
        self._begin()

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show the run's name."""
        super().on_test_batch_start(trainer, *args, **kwargs)
        self.test_progress_bar.set_description(_name(trainer))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Show where the stream is."""
        recorder = find_callback(trainer, Recorder)
        shown = {} if recorder is None else {name: printable(value) for name, value in recorder.status.items()}
        if shown and self.is_enabled:
            self.test_progress_bar.set_postfix(shown, refresh=False)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)
        total = self.total_test_batches_current_dataloader
        self._write(trainer, f"batch {batch_idx + 1}/{total}", shown=shown)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar, or write the last line."""
        super().on_test_end(trainer, pl_module)
        recorder = find_callback(trainer, Recorder)
        accuracy = None if recorder is None or recorder.results is None else recorder.results["overall"]["accuracy"]
        shown = {} if accuracy is None else {"accuracy": f"{accuracy:.3f}"}
        self._write(trainer, f"{trainer.num_test_batches[0]} batches", shown=shown, is_last=True)

    # -- lines

    def _begin(self) -> None:
        self._begun = self._written = time.monotonic()

    def _batches_done(self, trainer: Trainer) -> int:
        return int(trainer.fit_loop.epoch_loop.total_batch_idx) + 1

    def _write(
        self,
        trainer: Trainer,
        place: str,
        pl_module: LightningModule | None = None,
        shown: dict[str, str] | None = None,
        is_last: bool = False,
    ) -> None:
        now = time.monotonic()
        if not self.writes_lines or not self._enabled or (now - self._written < _INTERVAL and not is_last):
            return
        self._written = now
        logged = {} if pl_module is None else self.get_metrics(trainer, pl_module)
        values = [f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                  for name, value in {**logged, **(shown or {})}.items()]  # fmt: skip
        minutes, seconds = divmod(round(now - self._begun), 60)
        sys.stdout.write(", ".join([f"{_name(trainer)}: {place}", f"{minutes}:{seconds:02}", *values]) + "\n")
        sys.stdout.flush()


def _name(trainer: Trainer) -> str:
    """Return the name of a run: the last two parts of its folder."""
    return "/".join(Path(trainer.default_root_dir).parts[-2:])
