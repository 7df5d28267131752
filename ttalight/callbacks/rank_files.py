"""Files with the measurements of each process of a divided adaptation, which one process merges."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ttalight.errors import UsageError
from ttalight.files.atomic import write_files
from ttalight.files.tensors import load_tensors
from ttalight.reporting.predictions import PREDICTIONS

__all__ = ["FOLDER", "RankFiles"]

FOLDER = "ranks"


class RankFiles:
    """The folder ``ranks`` of a run: ``<rank>.pt`` with sums and counts, ``<rank>/predictions.npz``.

    All processes make one, at the same point of the run: rank 0 removes what an earlier run left.

    Args:
        run: The run's folder, which all processes see.
        trainer: The trainer of the run.
    """

    def __init__(self, run: str | Path, trainer: Trainer) -> None:
        self.folder = Path(run) / FOLDER
        self.rank, self.ranks = trainer.global_rank, trainer.world_size
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        #: Tells this run from others.
        self.token: float = trainer.strategy.broadcast(time.time())

    @property
    def predictions(self) -> Path:
        """Folder of this process's predictions."""
        return self.folder / str(self.rank)

    def write(self, content: dict[str, Any]) -> None:
        """Replace this process's file in one step.

        Args:
            content: Tensors and plain values.

        Raises:
            OSError: If the disk is full; the file before is kept.
        """
        file = io.BytesIO()
        torch.save({"token": self.token, **content}, file)
        write_files(self.folder, {f"{self.rank}.pt": file.getvalue()})

    def read(self) -> dict[int, dict[str, Any]]:
        """Return what each process has written so far; nothing in the files can run code."""
        paths = {rank: self.folder / f"{rank}.pt" for rank in range(self.ranks)}
        contents = {rank: load_tensors(path) for rank, path in paths.items() if path.is_file()}
        return {rank: content for rank, content in contents.items() if content["token"] == self.token}

    def read_all(self) -> list[dict[str, Any]]:
        """Return what every process has written.

        Raises:
            RuntimeError: If the file of one is missing.
        """
        contents = self.read()
        missing = [str(rank) for rank in range(self.ranks) if rank not in contents]
        if missing:
            raise UsageError(
                f"process {', '.join(missing)} of {self.ranks} left no measurements in {self.folder}: the folder of a "
                "run on several machines must be on a file system that all of them share (trainer.default_root_dir)"
            )
        return [contents[rank] for rank in range(self.ranks)]

    def ends_everywhere(self, ends: bool) -> bool:
        """Return whether any process is to end and tell the others where this one is."""
        mark = self.folder / f"end-{self.token}"
        if ends:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return mark.exists()

    def wait(self, trainer: Trainer) -> None:
        """Wait until all processes have measured.

        A barrier would handle no signal before all have come.

        Raises:
            SIGTERMException: If one of them is to end.
        """
        arrived: Any = torch.distributed.all_reduce(torch.zeros(1, device=trainer.strategy.root_device), async_op=True)
        while not arrived.is_completed():
            if self.ends_everywhere(trainer.received_sigterm):
                raise SIGTERMException
            time.sleep(0.02)
        arrived.wait()

    def prediction_files(self) -> list[Path]:
        """Return the archives of predictions that are there, by rank."""
        paths = [self.folder / str(rank) / PREDICTIONS for rank in range(self.ranks)]
        return [path for path in paths if path.is_file()]

    def discard(self) -> None:
        """Take the folder away: the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)
