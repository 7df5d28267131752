"""States of the jobs of a plan, and how each is run."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from ttalight.errors import InputError, UsageError
from ttalight.files.atomic import write_files
from ttalight.files.checkpoints import LAST, PREVIOUS, last_whole
from ttalight.reporting import read_results
from ttalight.reproduce.plan import Job, made_by
from ttalight.tasks.checkpoint import file_sha256, read_checkpoint

#: Runs the words after ``ttalight`` and returns an exit code.
Command = Callable[[list[str]], int]


def state(job: Job, root: Path) -> str:
    """Return ``done``, ``unfinished``, ``outdated`` (a file that it started from has changed since) or ``to do``.

    Raises:
        ValueError: If there is a run of that name with another configuration, or one without a whole checkpoint.
    """
    path, run = _plan_file(job, root), root / job.name
    if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != job.config and run.is_dir():
        raise InputError(
            f"{run} was run with another configuration than this plan has ({path}): give another --output, or take "
            "the folder away"
        )
    found = {"export": _export_state, "adapt": _adapt_state, "fit": _fit_state}[job.verb](job, run)
    return "outdated" if found != "to do" and _is_outdated(job, root) else found


def _export_state(job: Job, run: Path) -> str:
    return "done" if run.is_file() else "to do"


def _adapt_state(job: Job, run: Path) -> str:
    try:
        return "done" if read_results(run)["complete"] else "unfinished"
    except (FileNotFoundError, ValueError):
        return "unfinished" if (run / "config.yaml").is_file() else "to do"


def _fit_state(job: Job, run: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fit itself says which one it resumes from
            whole = last_whole(run / "checkpoints")
    except ValueError as error:
        raise InputError(f"{job.name} has no whole checkpoint: take {run} away to train it again ({error})") from error
    if whole is None:
        return "to do"
    epochs = int(read_checkpoint(str(whole), job.name)["epoch"]) + 1
    return "done" if whole.name == LAST and epochs >= job.config["trainer"]["max_epochs"] else "unfinished"


def _is_outdated(job: Job, root: Path) -> bool:
    """Return whether a file that a run started from is another one now; what is not recorded or gone, is not."""
    started: dict[str, str | None] = {}
    if _started_file(job, root).is_file():
        started |= json.loads(_started_file(job, root).read_text(encoding="utf-8"))
    if job.verb == "adapt":
        with contextlib.suppress(FileNotFoundError, ValueError):
            started[job.reads[0]] = read_results(root / job.name)["source"]["sha256"]
    files = {name: made_by(name, root) for name, digest in started.items() if digest is not None}
    return any(file.is_file() and _sha256(file) != started[name] for name, file in files.items())


def _sha256(file: Path) -> str:
    found = file.stat()
    return _sha256_of(str(file), found.st_size, found.st_mtime_ns)


@functools.cache
def _sha256_of(path: str, size: int, changed: int) -> str:
    return file_sha256(path)


def execute(job: Job, root: Path, command: Command) -> None:
    """Run a job unless it is done.

    Args:
        job: The job.
        root: Folder of the runs.
        command: Runs the words after ``ttalight`` and returns an exit code.

    Raises:
        RuntimeError: If it fails.
    """
    found = state(job, root)
    if found == "done":
        return
    sys.stdout.write(f"{job.verb} {job.name} ({found})\n")
    sys.stdout.flush()
    if found == "outdated":  # before what it starts from is noted: a stop here must not make the old run look current
        _remove_results(job, root)
    texts = {_plan_file(job, root).name: yaml.safe_dump(job.config, sort_keys=False)}
    if found != "unfinished":
        started = {name: _sha256(made_by(name, root)) for name in job.reads if made_by(name, root).is_file()}
        texts[_started_file(job, root).name] = json.dumps(started, indent=2) + "\n"
    write_files(root / "plans", texts)
    if job.verb == "export":
        _export(job, root)
        return
    words = [job.verb, "--config", str(_plan_file(job, root))]
    if found == "unfinished":
        words += ["--ckpt_path", "last"] if job.verb == "fit" else ["--resume", str(root / job.name)]
    else:
        words += ["--overwrite"]  # what a run left that had not begun, or that began from another file
    code = command(words)
    if code:
        raise UsageError(f"{job.verb} {job.name} stopped with code {code}: the same command resumes it")


def _remove_results(job: Job, root: Path) -> None:
    run = root / job.name
    for file in (made_by(job.name, root), run / "checkpoints" / PREVIOUS, run / "results.json", run / "config.yaml"):
        file.unlink(missing_ok=True)


def _plan_file(job: Job, root: Path) -> Path:
    return root / "plans" / f"{job.name}.yaml"


def _started_file(job: Job, root: Path) -> Path:
    """Return the file with the SHA-256 of what a job read when it began, by the name of the job that made it."""
    return root / "plans" / f"{job.name}.started.json"


def _export(job: Job, root: Path) -> None:
    """Write the encoder of a supervised checkpoint as a file of weights, for methods that start from one."""
    weights = read_checkpoint(job.config["weights"], "weights")["state_dict"]
    encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    temporary = root / f".{job.name}.tmp"
    torch.save(encoder, temporary)
    temporary.replace(root / job.name)
