"""Saves a run's configuration once the run can begin, instead of that of the run before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning import LightningModule
from lightning.pytorch.cli import SaveConfigCallback

from ttalight.files.run_folder import remove

__all__ = ["RunSetup"]


class RunSetup(SaveConfigCallback):
    """Removes the run that is replaced, and saves the configuration.

    Both wait until data are read, weights loaded and callbacks started: a run that cannot begin leaves the old one as
    it was.

    Args:
        args: As of ``SaveConfigCallback``.
        replaced: Files and folders of the run that is replaced.
        resumes: Whether the run is one that was stopped: it keeps the configuration that it was begun with.
        kwargs: As of ``SaveConfigCallback``.
    """

    def __init__(self, *args: Any, replaced: Sequence[Path] = (), resumes: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replaced = replaced
        self.resumes = resumes

    def setup(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Begin, once."""
        if self.already_saved or self.resumes:
            return
        if trainer.is_global_zero:
            remove([path for path in self.replaced if path.name != self.config_filename])
        # It has its name only once it is complete: half a configuration is a whole one of another run. Until then the
        # one before stays: whenever this process is killed, there is one to resume.
        name, self.config_filename = self.config_filename, f".{self.config_filename}.{os.getpid()}.tmp"
        super().setup(trainer, pl_module, str(trainer.state.stage))
        if trainer.is_global_zero and trainer.log_dir is not None:
            os.replace(Path(trainer.log_dir) / self.config_filename, Path(trainer.log_dir) / name)
        self.config_filename = name

    on_test_epoch_start = on_validation_epoch_start = on_predict_epoch_start = on_fit_start
