"""Runs a grid of adaptations: ``ttalight sweep``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ttalight.errors import UsageError
from ttalight.files.atomic import write_files
from ttalight.reporting.compare import compare
from ttalight.reporting.groups import find_runs, stream_differences
from ttalight.reporting.text import printable
from ttalight.sweep.execution import execute
from ttalight.sweep.grid import Sweep, read_sweep
from ttalight.sweep.progress import SweepProgress
from ttalight.sweep.runs import Job, check, state
from ttalight.sweep.selection import FILE, candidate_table, choose, validation_jobs

_ABOUT = (
    "Run 'ttalight adapt' for every combination of a grid. The file names a configuration (config) and lists of values "
    "(grid). What is finished is skipped and what was stopped resumes: the same command continues."
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after ``ttalight sweep``; those of the process by default.

    Raises:
        ArgumentError: If the words are wrong.
        FileNotFoundError: If the file or a configuration is missing.
        RuntimeError: If runs failed.
        SystemExit: With code 130 if it was interrupted, 143 if SIGTERM stopped it.
        ValueError: If the file is not one of a sweep.
    """
    options = _parse(args)
    sweep = read_sweep(options.file)
    jobs = [Job(run.name, sweep.folder / run.name, run.words) for run in sweep.runs]
    check(jobs)
    validation = validation_jobs(sweep) if options.select else []
    check(validation)
    if options.dry_run:
        _list(_part(validation or jobs, options.part), options.select)
        return
    write_files(sweep.folder, {sweep.file.name: sweep.text})
    try:
        if options.select:
            _run(sweep, validation, options)
            if any(state(job.folder) != "finished" for job in validation):
                sys.stdout.write(f"{_count(validation)}; the choice needs all: run the other parts, then this again\n")
                return
            jobs = _chosen(sweep, jobs, validation)
        _run(sweep, jobs, options)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: {_count([*validation, *jobs])}; the same command continues\n")
        raise SystemExit(130) from None
    _print_table(sweep, jobs)


def _parse(args: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="ttalight sweep", description=_ABOUT, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("file", type=str, help="The sweep, a file in YAML with 'config' and 'grid'.")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="Processes that share the runs.")
    parser.add_argument("--part", type=str, metavar="I/N", help="Runs I, I+N, ... only: one job of an array of N.")
    parser.add_argument(
        "--select",
        action="store_true",
        help="Choose the adapters' arguments on the validation split, then run the chosen ones on the test stream.",
    )
    parser.add_argument("--dry-run", action="store_true", help="List the runs, and which are finished.")
    options = parser.parse_args(None if args is None else list(args))
    if options.jobs < 1:
        raise argparse.ArgumentError(None, f"--jobs must be at least 1, got {options.jobs}")
    found = re.fullmatch(r"(\d+)/(\d+)", options.part or "1/1")
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentError(
            None, f"--part must be I/N with I from 1 to N, for example 1/8, got {options.part}"
        )
    options.part = int(found[1]), int(found[2])
    return options


def _part(jobs: Sequence[Job], part: tuple[int, int]) -> Sequence[Job]:
    return jobs[part[0] - 1 :: part[1]]


def _run(sweep: Sweep, jobs: Sequence[Job], options: Namespace) -> None:
    """Run what is not finished.

    Raises:
        RuntimeError: If runs failed, which are listed.
    """
    own = _part(jobs, options.part)
    left = [job for job in own if state(job.folder) != "finished"]
    failed = execute(left, options.jobs, SweepProgress(sweep.name, len(left))) if left else {}
    for fault, runs in failed.items():
        sys.stderr.write(printable(f"failed: {fault}") + f"\n  in {' '.join(str(job.folder) for job in runs)}\n")
    if failed:
        _print_table(sweep, jobs)
        count = sum(map(len, failed.values()))
        raise UsageError(f"{count} of {len(own)} runs failed: the same command tries them again")


def _chosen(sweep: Sweep, jobs: Sequence[Job], validation: Sequence[Job]) -> list[Job]:
    """Choose, say what was chosen, and return the runs on the test stream that have it."""
    candidates = choose(sweep, validation)
    sys.stdout.write(f"\n{candidate_table(candidates)}\n\nThe choice: {sweep.folder / FILE}\n\n")
    chosen = {candidate["candidate"] for candidate in candidates if candidate["chosen"]}
    return [job for run, job in zip(sweep.runs, jobs, strict=True) if run.candidate in chosen]


def _list(jobs: Sequence[Job], select: bool) -> None:
    for job in jobs:
        sys.stdout.write(f"{state(job.folder):8} {printable(job.name)}\n")
    sys.stdout.write(_count(jobs) + ("; the chosen ones on the test stream follow\n" if select else "\n"))


def _count(jobs: Sequence[Job]) -> str:
    return f"{sum(state(job.folder) == 'finished' for job in jobs)} of {len(jobs)} runs are finished"


def _print_table(sweep: Sweep, jobs: Sequence[Job]) -> None:
    """Print the comparison of all finished runs, and the command that repeats it."""
    done = [str(job.folder) for job in jobs if state(job.folder) == "finished"]
    if not done:
        return
    different = list(stream_differences(find_runs(done)[0]))
    sys.stdout.write(f"\n{compare(done, different)}\n")
    there = {str(path.parent) for path in Path(sweep.folder).rglob("results.json")}
    folders = [str(sweep.folder)] if there == set(done) else done
    words = ["ttalight", "compare", *folders, *(["--different", *different] if different else [])]
    sys.stdout.write(f"\nThe table again: {shlex.join(words)}\n")
