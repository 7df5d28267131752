"""TensorBoard files that are cut back to a point that was noted, so that no event is written twice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["cut_back", "event_sizes"]

_PATTERN = "events.out.tfevents.*"


def event_sizes(logger: TensorBoardLogger) -> dict[str, int]:
    """Return the size in bytes of each event file of a logger, by its name, with all events so far in it."""
    logger.experiment.flush()
    return {path.name: path.stat().st_size for path in Path(logger.log_dir).glob(_PATTERN)}


def cut_back(logger: TensorBoardLogger, sizes: Mapping[str, int] | None) -> None:
    """Remove the events logged after ``event_sizes`` was called. Later events go to a new file.

    Args:
        logger: The logger of the same folder, in this process or another.
        sizes: What ``event_sizes`` returned; files that it does not name are removed. Where a file that it names is
            missing or shorter, it is not of this folder, and all files stay. None removes all.
    """
    logger.experiment.close()
    present = {path.name: path for path in Path(logger.log_dir).glob(_PATTERN)}
    kept = {} if sizes is None else sizes
    fits = all(name in present and present[name].stat().st_size >= size for name, size in kept.items())
    if sizes is not None and not (sizes and fits):
        return
    for name, path in present.items():
        if name not in kept:
            path.unlink()
        elif path.stat().st_size > kept[name]:
            os.truncate(path, kept[name])
