"""A progress bar that shows the domain and the running accuracy."""

from __future__ import annotations

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from ttalight.callbacks.recorder import Recorder
from ttalight.callbacks.search import find_callback
from ttalight.reporting.text import printable

__all__ = ["Progress"]


class Progress(TQDMProgressBar):
    """Lightning's bar, with the recorder's domain and running accuracy during an evaluation.

    Args:
        refresh_rate: Batches between two refreshes; 0 switches the bar off. By default every batch on a terminal, and
            every fifth where the output goes to a file.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        super().__init__(refresh_rate=refresh_rate if refresh_rate is not None else 1 if sys.stdout.isatty() else 5)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Show where the stream is."""
        recorder = find_callback(trainer, Recorder)
        if recorder is not None and recorder.status and not self.is_disabled:
            shown = {name: printable(value) for name, value in recorder.status.items()}
            self.test_progress_bar.set_postfix(shown, refresh=False)
        super().on_test_batch_end(trainer, pl_module, *args, **kwargs)
