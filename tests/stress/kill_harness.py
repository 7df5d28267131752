"""Kills ``fit`` and ``adapt`` at points spread over all their phases, resumes, and compares with an uninterrupted run.

    python tests/stress/kill_harness.py [--kills 50] [--folder kill-harness]

A point is every hook of the trainer that a callback sees (setup, each batch's begin and end, checkpoints, ends), and
the moment before each file is opened to be written, synced, renamed or removed. An uninterrupted run counts the points;
the kills are spread evenly over them, half on ``fit`` and half on ``adapt``. At a point the process sends itself
SIGKILL. Every second kill at a file that is being written cuts away half of what has not been synced yet, as a power
cut may. Then the run resumes by the documented command, ``fit --ckpt_path last`` or ``adapt --resume``, or begins again
where nothing was there yet, and must leave what the uninterrupted one left, bit for bit: weights, optimizer and epoch
of ``last.ckpt``; results, table, predictions, stream and curves; and no temporary file. Before it resumes, nothing
unfinished may pass for complete: ``compare`` must leave the run out, and no file under its own name may be half of one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ttalight  # noqa: F401  (first: it makes torchvision importable beside a CPU build of torch)

# isort: split
from lightning import Callback

from ttalight.cli import CLI
from ttalight.cli import main as ttalight_main
from ttalight.data.streams import Stream
from ttalight.files.checkpoints import last_whole
from ttalight.reporting import read_predictions, read_results
from ttalight.trainer import Trainer

QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false".split()
DIGITS = "--data DigitsDataModule --data.limit 20 --data.batch_size 5 --data.domains [clean,contrast]".split()
FIT = [
    *"fit --model SupervisedTask --model.encoder cifar_resnet8 --trainer.max_epochs 3".split(),
    *"--trainer.limit_train_batches 3 --trainer.limit_val_batches 2 --trainer.num_sanity_val_steps 0".split(), *DIGITS,
    *QUIET,
]  # fmt: skip
ADAPT = [
    *"adapt --model SupervisedTask --model.encoder cifar_resnet8 --adapter Tent --predictions true".split(),
    *"--trainer.callbacks+=AdaptationCheckpoint --trainer.callbacks.every 2".split(), *DIGITS, *QUIET,
]  # fmt: skip
COMMANDS = {"fit": FIT, "adapt": ADAPT}
HOOKS = [
    f"on_{name}" for name in (
        "fit_start", "train_start", "train_epoch_start", "train_batch_start", "train_batch_end", "train_epoch_end",
        "validation_start", "validation_batch_end", "validation_end", "save_checkpoint", "train_end", "fit_end",
        "test_start", "test_epoch_start", "test_batch_start", "test_batch_end", "test_epoch_end", "test_end",
    )
] + ["setup", "teardown"]  # fmt: skip


class Points:
    """Counts the points of a run, and kills the process at one.

    Args:
        at: Number of the point to die at; None only counts.
        torn: Whether half of what a file has beyond its last sync is cut away before.
    """

    def __init__(self, at: int | None, torn: bool) -> None:
        self.at, self.torn = at, torn
        self.names: list[str] = []
        self._synced: dict[int, int] = {}

    def reach(self, name: str, descriptor: int | None = None) -> None:
        """Count a point, and die if it is the one."""
        self.names.append(name)
        if self.at == len(self.names) - 1:
            if descriptor is not None and self.torn:
                file = os.fstat(descriptor)
                synced = self._synced.get(file.st_ino, 0)
                # A smaller file is another one in the place of one that is gone.
                os.ftruncate(descriptor, ((synced if synced < file.st_size else 0) + file.st_size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if descriptor is not None:
            file = os.fstat(descriptor)
            self._synced[file.st_ino] = file.st_size

    def before(self, module: Any, name: str) -> None:
        """Make a function of the file system a point."""
        real = getattr(module, name)

        def reached(*args: Any, **kwargs: Any) -> Any:
            self.reach(f"{name} {args[0]}", args[0] if name == "fsync" else None)
            return real(*args, **kwargs)

        setattr(module, name, reached)

    def before_opening(self, folder: Path) -> None:
        """Make every opening of a file for writing in a folder a point."""

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                path = Path(os.path.abspath(arguments[0]))
                if folder in path.parents:
                    self.reach(f"open {path}")

        sys.addaudithook(audit)

    def callback(self) -> Callback:
        """Return a callback of which every hook is a point."""

        def hook(name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: self.reach(name)

        return type("AtEveryHook", (Callback,), {name: hook(name) for name in HOOKS})()


def child(words: list[str], folder: Path, points: Points | None) -> None:
    """Run a command in this process; with points it may die."""
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if points is not None:
        for name in ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "truncate"):
            points.before(os, name)
        points.before_opening(folder / "runs")
        points.before(shutil, "rmtree")
        make = CLI.instantiate_trainer

        def with_points(self: CLI, **kwargs: Any) -> Trainer:
            trainer = make(self, **kwargs)
            trainer.callbacks.append(points.callback())  # type: ignore[attr-defined]
            return trainer

        CLI.instantiate_trainer = with_points  # type: ignore[method-assign]
    ttalight_main(words)


def in_process(words: list[str], folder: Path, points: Points | None = None) -> tuple[int, list[str], str]:
    """Run a command in a forked process.

    Returns:
        Exit code (negative if a signal ended it), the points, and what it wrote.
    """
    log = folder / "log.txt"
    names = folder / "points.json"
    names.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 1
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file  # also where a test runner has replaced them
            try:
                child(words, folder, points)
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                if points is not None and points.at is None:
                    names.write_text(json.dumps(points.names))
                os._exit(code)
    _, status = os.waitpid(process, 0)
    found = json.loads(names.read_text()) if names.is_file() else []
    return os.waitstatus_to_exitcode(status), found, log.read_text()


def numbers(run: Path) -> dict[str, Any]:
    """Return the results without times."""
    results: Any = read_results(run)
    results["cost"] |= {"images_per_second": None, "peak_memory_bytes": None}
    for row in results["domains"]:
        row["seconds"] = row["images_per_second"] = None
    return dict(results)


def same(one: Any, other: Any) -> bool:
    """Compare trees of tensors and plain values, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def weights(run: Path) -> dict[str, Any]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {name: content[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")}


def table(run: Path) -> list[dict[str, str]]:
    """Return the rows of ``domains.csv`` without times."""
    with (run / "domains.csv").open(newline="") as file:
        return [row | {"seconds": "", "images_per_second": ""} for row in csv.DictReader(file)]


def curves(run: Path) -> list[tuple[Any, ...]]:
    """Return what TensorBoard reads: tag, step and value of each scalar, and the text of the table without times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    scalars = [(tag, event.step, event.value) for tag in tags["scalars"] for event in events.Scalars(tag)]
    return sorted(scalars) + [(tag, len(events.Tensors(tag))) for tag in sorted(tags["tensors"])]


def check_same(stage: str, run: Path, whole: Path, logged: bool = True) -> None:
    """Make sure that a run left what the uninterrupted one did, its curves if ``logged``, and no temporary file."""
    left = [str(path.relative_to(run)) for path in run.rglob("*") if path.name.startswith(".")]
    assert not left, f"temporary files: {left}"
    if stage == "fit":
        assert same(weights(run), weights(whole)), "other weights"
        return
    assert numbers(run) == numbers(whole), "other results"
    for name in ("predictions.npz", "stream.npz"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"other {name}"
    assert table(run) == table(whole), "another table"
    assert not logged or curves(run) == curves(whole), "other curves"
    assert not (run / "adaptation").exists(), "the checkpoints are still there"


def check_nothing_passes_for_whole(stage: str, run: Path, whole: Path) -> None:
    """Make sure that what a kill left is whole, or does not claim to be."""
    if stage == "fit":
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # after a kill last.ckpt is whole; the one before is for other damage
            if (run / "checkpoints" / "last.ckpt").exists():
                assert last_whole(run / "checkpoints") is not None
        return
    if (run / "results.json").exists():
        complete = read_results(run)["complete"]
        assert not complete or numbers(run) == numbers(whole), "partial results pass for complete"
    if (run / "predictions.npz").exists():
        read_predictions(run)
    if (run / "stream.npz").exists():
        Stream.load(run / "stream.npz")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        ttalight_main(["compare", str(run)])
    finished = (run / "results.json").exists() and read_results(run)["complete"]
    assert finished or "no finished run" in said.getvalue(), f"compare shows a partial run: {said.getvalue()}"


def go_on(stage: str, words: list[str], folder: Path, run: Path) -> None:
    """Resume a killed run as the documentation describes."""
    if stage == "fit":
        there = any((run / "checkpoints" / name).is_file() for name in ("last.ckpt", "previous.ckpt"))
        code, _, said = in_process([*words, *(["--ckpt_path", "last"] if there else ["--overwrite"])], folder)
    elif (run / "config.yaml").is_file():
        code, _, said = in_process(["adapt", "--resume", str(run.relative_to(folder))], folder)
        if code == 2 and "is complete, there is nothing to resume" in said:
            code = 0
    else:
        code, _, said = in_process([*words, "--overwrite"], folder)
    assert code == 0, f"resuming failed with {code}: {said[-2000:]}"


def count_points(stage: str, command: list[str], folder: Path) -> list[str]:
    """Make the uninterrupted run, ``runs/<stage>-whole``, and return its points."""
    code, names, said = in_process([*command, "--name", f"{stage}-whole"], folder, Points(None, False))
    assert code == 0, said
    return names


def kill(stage: str, command: list[str], folder: Path, names: list[str], at: int, torn: bool) -> str:
    """Kill at a point and resume.

    Args:
        stage: ``fit`` or ``adapt``.
        command: The words of the command.
        folder: Where the uninterrupted run is.
        names: All points.
        at: Number of the point.
        torn: See ``Points``.

    Returns:
        A line that says where it was.

    Raises:
        AssertionError: If the run did not reach the uninterrupted result.
    """
    words = [*command, "--name", f"{stage}-{at}"]
    run, whole = folder / "runs" / f"{stage}-{at}", folder / "runs" / f"{stage}-whole"
    code, _, said = in_process(words, folder, Points(at, torn))
    where = f"{stage} at point {at} of {len(names)}, before {names[at].replace(str(folder), '.')}"
    assert code == -signal.SIGKILL, f"{where}: ended with {code} {said[-2000:]}"
    try:
        check_nothing_passes_for_whole(stage, run, whole)
        go_on(stage, words, folder, run)
        check_same(stage, run, whole)
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error
    shutil.rmtree(run)
    return where


def kills(folder: Path, count: int, first: int = 0) -> Iterator[str]:
    """Kill and resume; yields a line for each kill.

    Args:
        folder: Where to work.
        count: Number of kills, half of ``fit``, half of ``adapt``.
        first: Shifts the points.

    Raises:
        AssertionError: If a run did not reach the uninterrupted result.
    """
    for share, (stage, command) in enumerate(COMMANDS.items()):
        names = count_points(stage, command, folder)
        own = (count + 1 - share) // 2
        for number in range(own):
            at = (number * len(names) // own + first) % len(names)
            yield kill(stage, command, folder, names, at, torn=number % 2 == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="shifts the points, to see others")
    parser.add_argument("--folder", type=Path, default=Path("kill-harness"), help="a new folder to work in")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    done = 0
    for line in kills(folder, options.kills, options.first):
        done += 1
        print(f"{done:3} {line}", flush=True)
    print(f"{done} kills, each run went on to the uninterrupted result")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
