"""The checkpoints of an adaptation on disk: ``adaptation/batch-<k>-<digest>.ckpt``."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ttalight.callbacks.rank_files import FOLDER as RANKS
from ttalight.errors import ExistingFileError, InputError
from ttalight.files.atomic import write_files
from ttalight.files.difference import Between, difference
from ttalight.files.run_folder import find_files, remove
from ttalight.files.tensors import load_tensors
from ttalight.reporting import Results, read_results

__all__ = ["FOLDER", "check_resumable", "check_unused", "finish", "list_checkpoints", "read_last", "write_checkpoint"]

FOLDER = "adaptation"

#: Files that a run removes at its end.
_TEMPORARY = (FOLDER, RANKS, ".predictions.npz.*.parts", ".*.tmp")
_FORMAT = 2
_PARTS = {"identity": str, "adapter": dict, "recorder": dict, "events": dict, "random": dict}
_NAME = re.compile(r"batch-(\d+)-([0-9a-f]{16})\.ckpt")


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return number of batches and path of each checkpoint in a run's folder, the last one first."""
    paths = [(int(found[1]), path) for path in (run / FOLDER).glob("*") if (found := _NAME.fullmatch(path.name))]
    return sorted(paths, reverse=True)


def write_checkpoint(run: Path, batches: int, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically, then remove all but the last two.

    Its name has the first 16 digits of the SHA-256 of the file, as PyTorch's hub names files.

    Args:
        run: The run's folder.
        batches: Number of batches that are done.
        content: Tensors and plain values.

    Raises:
        OSError: If the disk is full; the checkpoints before are kept.
    """
    file = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, file)
    digest = hashlib.sha256(file.getbuffer()).hexdigest()[:16]
    write_files(run / FOLDER, {f"batch-{batches}-{digest}.ckpt": file.getvalue()})
    for _, path in list_checkpoints(run)[2:]:
        path.unlink(missing_ok=True)


def read_last(run: Path) -> dict[str, Any] | None:
    """Return the last checkpoint that is whole, with a warning about those that are not; None if there is none at all.

    Nothing in the file can run code.

    Raises:
        ValueError: If there are checkpoints, and all of them are damaged.
    """
    checkpoints = list_checkpoints(run)
    for position, (batches, path) in enumerate(checkpoints):
        try:
            return _read(path)
        except ValueError as error:
            others = checkpoints[position + 1 :]
            if not others:
                raise InputError(f"{error}, and no other is left: start the run again") from error
            warnings.warn(
                f"{error}: the run continues from the one before, batch {others[0][0]} instead of {batches}",
                stacklevel=2,
            )
    return None


def _read(path: Path) -> dict[str, Any]:
    named = _NAME.fullmatch(path.name)
    data = path.read_bytes()
    if named is None or hashlib.sha256(data).hexdigest()[:16] != named[2]:
        raise InputError(f"the checkpoint {path} is damaged, its content does not fit the digest in its name")
    try:
        content: dict[str, Any] = load_tensors(data)
    except Exception as error:  # what archive and unpickler say has no common base class
        raise InputError(f"the checkpoint {path} cannot be read ({type(error).__name__})") from error
    if difference({"format": Between(_FORMAT, _FORMAT)}, content) is not None:
        raise InputError(f"the checkpoint {path} is not one of this version of the package")
    batches = Between(int(named[1]), int(named[1]))
    if fault := difference(_PARTS | {"batches": batches}, content):
        raise InputError(f"the checkpoint {path} ({fault}) lacks what a run needs to resume")
    return content


def check_resumable(run: Path) -> None:
    """Make sure that a folder has a run that is not over.

    Raises:
        ValueError: If it has none, or one that is complete and has cleaned up.
    """
    if not any((run / name).is_file() for name in ("config.yaml", "stream.npz")):
        raise InputError(f"there is no run in {run} to resume: give the folder of a run that adapt has begun")
    if _is_complete(run) and not find_files(run, _TEMPORARY):
        raise InputError(
            f"the run in {run} is complete, there is nothing to resume: give a new run another name, or replace this "
            "one with --overwrite"
        )


def check_unused(folders: Iterable[Path]) -> None:
    """Make sure that no folder has what an earlier run has measured.

    Raises:
        FileExistsError: If one has; says how to replace it.
    """
    for folder in folders:
        stopped = list_checkpoints(folder)
        if stopped or (folder / "results.json").is_file():
            resume = f", or resume the run with resume={str(folder)!r}" if stopped else ""
            raise ExistingFileError(
                f"there are results in {folder} already: give another default_root_dir, or replace them with "
                f"adapt(..., overwrite=True){resume}"
            )


def warn_of_results(folders: Iterable[Path]) -> None:
    """Warn where an evaluation is about to replace the results of an earlier one."""
    for folder in folders:
        if (folder / "results.json").is_file():
            warnings.warn(
                f"this evaluation replaces the results in {folder}: give another default_root_dir to keep them",
                stacklevel=3,
            )


def finish(run: Path, clean: bool = True) -> Results | None:
    """Clean up a run that was stopped when its results were complete already.

    Args:
        run: The run's folder.
        clean: Whether this process removes what is left, the first of several.

    Returns:
        The results; None if they are not complete.
    """
    if not _is_complete(run):
        return None
    if clean:
        remove(find_files(run, _TEMPORARY))
    return read_results(run)


def _is_complete(run: Path) -> bool:
    try:
        return read_results(run)["complete"]
    except (FileNotFoundError, ValueError):
        return False
