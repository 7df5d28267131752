"""Checkpoints that a crash or a full disk leaves either old or new, never half of one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ttalight.reporting.files import write_files

__all__ = ["CheckpointFiles"]


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced in one step.

    Lightning writes a new file to the system's temporary folder first and moves it from there. Between two file systems
    that is a copy over the old file, so whatever stops it, a full disk or a kill, costs the old checkpoint as well.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a path with a scheme, such as s3://, is left to Lightning.

        Raises:
            OSError: If the disk is full or the folder not writable; what was there before is kept.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_files(Path(path).parent, {Path(path).name: content.getvalue()})
