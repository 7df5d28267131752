"""Checkpoints that a crash or a full disk leaves either old or new, never half of one."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from ttalight.errors import InputError, MissingFileError
from ttalight.files.atomic import write_files
from ttalight.files.difference import Between, difference, known
from ttalight.files.tensors import load_tensors
from ttalight.reporting.results import Source
from ttalight.tasks.checkpoint import file_sha256, load_weights, read_checkpoint, select

__all__ = ["LAST", "PREVIOUS", "CheckpointFiles", "last_whole", "load_module"]

#: The checkpoint that a run resumes from, and its name when the next one is written.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
#: What Lightning takes for granted in a checkpoint.
_FORM = {"state_dict": dict, "pytorch-lightning_version": str}
_COUNTS = {"epoch": Between(0, 2**62), "global_step": Between(0, 2**62), "callbacks": dict}


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced in one step; of ``last.ckpt`` the one before stays as ``previous.ckpt``.

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
        write_files(Path(path).parent, {Path(path).name: content.getvalue()}, keep={LAST: PREVIOUS})

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, tensors and plain values only, and only if it is whole.

        Raises:
            ValueError: If it is not, or if ``weights_only=False`` asks for a file that may run code.
        """
        if weights_only is False:
            raise InputError(
                "checkpoints are read with weights_only=True always: save the hyper-parameters as plain values, or use "
                "Lightning's own Trainer for a file that you trust"
            )
        if "://" in str(path):
            remote: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
            return remote
        try:
            content: dict[str, Any] = load_tensors(Path(path))  # on the CPU; the strategy moves what it takes
        except Exception as error:  # what archive, unpickler and tensors say of damage has no common base class
            raise InputError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error})") from error
        if fault := difference(_FORM, content) or difference(known(_COUNTS, content), content):
            raise InputError(f"{path} is not a checkpoint that a run can resume from ({fault})")
        content.setdefault("callbacks", {})  # without it Lightning does not call the callbacks' hooks
        return content


def last_whole(folder: Path) -> Path | None:
    """Return the checkpoint of a run to resume from: ``last.ckpt``, or the one before with a warning why.

    Args:
        folder: The run's folder of checkpoints.

    Returns:
        A path that can be read; None if there is no checkpoint at all.

    Raises:
        ValueError: If there are checkpoints, and all of them are damaged.
    """
    fault: Exception | None = None
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            content = read_checkpoint(str(path), "ckpt_path")
        except ValueError as error:
            fault = fault or error
            continue
        if path.name == PREVIOUS:
            reason = f"{fault}" if fault is not None else f"there is no {folder / LAST}"
            warnings.warn(
                f"{reason}: the run continues from the one before, {path}, of epoch {content.get('epoch')}",
                stacklevel=2,
            )
        return path
    if fault is not None:
        raise InputError(f"{fault}, and no other is left: start the run again with --overwrite") from fault
    return None


def load_module(module: LightningModule, path: str | Path | None) -> Source | None:
    """Load all weights of a module from a checkpoint of Lightning or from a file of its state dict.

    The module's own ``on_load_checkpoint`` is called first, as Lightning's ``load_from_checkpoint`` calls it.

    Args:
        module: Receives the weights.
        path: The file; nothing in it can run code. Without one there is a warning if the module's weights are random.

    Returns:
        The file and its SHA-256, as results name their source; None without a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another class, if keys are missing, left over or of other shapes, or if
            the module has weights by an argument of its own.
    """
    name = type(module).__name__
    if path is None:
        if getattr(module, "has_random_weights", False):
            rank_zero_warn(
                f"nothing was loaded into this {name}: its weights are random. Name the file of a trained one by the "
                "task's own argument, or by --weights (weights=)"
            )
        return None
    if own := module.hparams.get("weights"):
        raise InputError(
            f"weights: {name} has an argument of that name, which is {str(own)!r:.60}, and --weights (weights=) is "
            f"{str(path)!r:.60}: give one of them"
        )
    if not Path(path).is_file():
        raise MissingFileError(
            f"weights: there is no file {path}: name a checkpoint that fit has written, or a file of a state dict"
        )
    content = read_checkpoint(str(path), "weights")
    writer = content.get("ttalight", {}).get("task")
    if writer not in (None, name):
        raise InputError(f"weights: {path} was written by {writer}, expected the checkpoint of a {name}")
    if "state_dict" in content:
        module.on_load_checkpoint(content)
    load_weights(module, select(content, {"": ""}), str(path), "weights")
    return {"file": str(path), "sha256": file_sha256(str(path))}
