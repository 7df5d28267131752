"""Runs of a sweep in one process: each is ``ttalight adapt`` with its own words, and all share one parser."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ttalight.callbacks.search import callbacks_of, find_callbacks
from ttalight.callbacks.termination import TERMINATED
from ttalight.cli.command import CLI
from ttalight.cli.error_messages import expected_message, one_line, without_parser
from ttalight.errors import InputError
from ttalight.files.atomic import write_files
from ttalight.reporting import read_results
from ttalight.sweep.grid import RUNS
from ttalight.trainer import Trainer

__all__ = ["Job", "attempt", "check", "read_config", "state"]

#: What a run was begun with, and the traceback of one that failed.
_RECORD, _ERROR = "sweep.json", "error.txt"


@dataclass(frozen=True)
class Job:
    """A run and its folder; ``name`` is that folder within the sweep's."""

    name: str
    folder: Path
    words: tuple[str, ...]


class _RunCLI(CLI):
    """``ttalight adapt`` for one of many runs: the parser is made once in a process, and only warnings are written.

    Args:
        words: As of ``CLI``.
        show: Is called after each batch with the share of the run that is done, 0 to 1.
    """

    _made: ClassVar[dict[str, Any]] = {}

    def __init__(self, words: list[str], show: Callable[[float], None] | None = None) -> None:
        self._show = show
        super().__init__(words)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Make the parser, or take the one of the run before."""
        if not self._made:
            before = set(vars(self))
            super().setup_parser(*args, **kwargs)
            self._made.update({name: value for name, value in vars(self).items() if name not in before})
            self._made["_parsers"] = self._parsers
        vars(self).update(self._made)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, for one device and without a bar of its own."""
        if self.config["adapt"].trainer.devices == "auto":
            kwargs["devices"] = 1
        trainer = super().instantiate_trainer(enable_model_summary=False, **kwargs)
        if trainer.world_size > 1:
            raise InputError(
                f"a sweep gives each run one device, and the configuration asks for {trainer.world_size}: set "
                "trainer.devices to 1, and use several devices by --part"
            )
        for bar in find_callbacks(trainer, ProgressBar):
            bar.disable()
        callbacks_of(trainer).append(_Share(self._show))
        return trainer

    def after_adapt(self) -> None:
        """Print nothing."""


class _Share(Callback):
    """Tells the share of the run that is done."""

    def __init__(self, show: Callable[[float], None] | None) -> None:
        self.show = show

    def on_test_batch_end(
        self,
        trainer: Any,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the share of batches that are done."""
        batches = trainer.num_test_batches
        if self.show is not None:
            self.show(min(1.0, (sum(batches[:dataloader_idx]) + batch_idx + 1) / sum(batches)))


def read_config(words: Sequence[str]) -> dict[str, Any]:
    """Return the whole configuration that options of ``adapt`` stand for.

    Raises:
        ArgumentError: If the parser refuses them.
    """
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):  # --print_config ends the command
        _RunCLI(["adapt", *words, "--print_config"])
    config: dict[str, Any] = yaml.safe_load(out.getvalue())
    return config


def check(jobs: Sequence[Job]) -> None:
    """Check before the first run that the parser takes every option, in one of the runs that have it.

    Raises:
        ValueError: If it refuses one, or if a run in a job's folder was begun with other options.
    """
    outdated = [(job, difference) for job in jobs if (difference := _difference(job)) is not None]
    if outdated:
        job, difference = outdated[0]
        raise InputError(
            f"{len(outdated)} of {len(jobs)} runs are there with other settings than the file gives them: {job.folder} "
            f"has {difference}. Give the sweep another name, or remove the folders of these runs"
        )
    seen: set[str] = set()
    for job in jobs:
        if seen.issuperset(job.words) or state(job.folder) == "finished":
            continue
        seen.update(job.words)
        try:
            read_config(job.words)
        except ArgumentError as error:
            raise InputError(f"{job.name}: {error}") from None


def state(folder: Path) -> str:
    """Return whether the run in a folder is ``finished``, ``stopped`` or still ``to do``."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        if read_results(folder)["complete"]:
            return "finished"
    return "stopped" if (folder / "config.yaml").is_file() else "to do"


def attempt(job: Job, show: Callable[[float], None] | None = None) -> str | None:
    """Run a job, or resume it where it was stopped; do nothing if it is finished.

    Args:
        job: The job.
        show: Is called after each batch with the share of the run that is done, 0 to 1.

    Returns:
        Why it failed; the traceback is in ``error.txt`` of its folder. None if it did not fail.

    Raises:
        KeyboardInterrupt: If it was interrupted.
        SystemExit: With code 143 if SIGTERM stopped it.
    """
    found = state(job.folder)
    if found == "finished":
        return None
    name = job.folder.relative_to(RUNS).as_posix()
    words = [*job.words, "--trainer.default_root_dir=null", f"--name={name}", "--overwrite"]
    if found == "stopped":
        words = [f"--resume={job.folder}"]
    else:
        write_files(job.folder, {_RECORD: json.dumps(_record(job), indent=2) + "\n"})
    try:
        with _until_terminated():
            _RunCLI(["adapt", *words], show)
    except SIGTERMException:
        raise SystemExit(TERMINATED) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # which Lightning turns into an exit
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        write_files(job.folder, {_ERROR: traceback.format_exc()})
        cause = error if isinstance(error, ArgumentError) else without_parser(error)
        expected = str(cause) if isinstance(cause, ArgumentError) else expected_message(cause)
        return expected or one_line(f"{type(cause).__name__}: {cause} (see {_ERROR} in its folder)")
    (job.folder / _ERROR).unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def _until_terminated() -> Iterator[None]:
    """End with code 143 after a SIGTERM, also where it comes too early or too late to end the run itself."""
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = True
        if signal.getsignal(signal.SIGTERM) is note:  # no run has a handler, which would end the batch first
            raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if noted:
            raise SystemExit(TERMINATED)


def _record(job: Job) -> dict[str, Any]:
    """Return what a run depends on: its options, and the contents of its configurations."""
    files = (Path(word.partition("=")[2]) for word in job.words if word.startswith("--config="))
    return {"words": list(job.words), "configs": {file.as_posix(): _digest(file) for file in files}}


def _digest(file: Path) -> str:
    """Return a digest of the values in a file, which comments do not change."""
    try:
        content = json.dumps(yaml.safe_load(file.read_text(encoding="utf-8")), sort_keys=True, default=str)
    except (ValueError, RecursionError, yaml.YAMLError):
        return ""  # the parser says what is wrong with it
    return hashlib.sha256(content.encode()).hexdigest()


def _difference(job: Job) -> str | None:
    """Say in what the run in a job's folder differs from it; None where there is no run, or the same one."""
    if not any((job.folder / name).is_file() for name in ("results.json", "config.yaml")):
        return None
    try:
        found = json.loads((job.folder / _RECORD).read_text(encoding="utf-8"))
        words, configs = set(found["words"]), found["configs"]
    except (OSError, ValueError, KeyError, TypeError):
        return "a run that no sweep has begun"
    own = _record(job)
    if words != set(own["words"]):
        there, here = sorted(words - set(own["words"])), sorted(set(own["words"]) - words)
        return f"{' '.join(there) or 'no such option'} instead of {' '.join(here) or 'none'}"
    changed = [name for name, digest in own["configs"].items() if configs.get(name) != digest]
    return f"another {', '.join(changed)}" if changed else None
