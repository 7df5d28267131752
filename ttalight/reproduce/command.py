"""Runs what the tables of CTA's paper need, and prints them beside the published numbers: ``ttalight reproduce``.

S. Barbeau et al., CTA: Cross-Task Alignment for Better Test Time Training, arXiv 2507.05221. Tables 1, 2, 4, 5 and 6
train and adapt, Table 3 compares settings. Data are read from the folder that TTALIGHT_DATA names.

First the plan and an estimate of the time are printed. Then each run is a command of its own; its configuration is in
``<output>/<recipe>/<data>/plans``. What is finished is skipped, and a run that was stopped resumes: training from its
last epoch, adaptation in the middle of its stream. Runs are shared between tables. A run that started from a file which
has changed since, by its SHA-256, is repeated.

The table goes to ``<output>/<recipe>/<data>/table<N>.md``; after Table 1 follows its figure (accuracy against
temperature), after Tables 2, 4 and 5 Figure 3 (accuracy against steps, control dashed), after Table 6 Figure 2 (t-SNE).
All tables and figures that are there make up ``report.html``.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from ttalight.errors import InputError
from ttalight.files.atomic import write_files
from ttalight.reproduce.estimate import plan_text, probe
from ttalight.reproduce.figures import draw
from ttalight.reproduce.jobs import Command, execute, state
from ttalight.reproduce.plan import Plan, Planner
from ttalight.reproduce.recipes import DATA, METHODS, RECIPES, TABLE_DATA
from ttalight.reproduce.tables import render, report

_ABOUT = (
    "Run what the tables of CTA's paper (arXiv 2507.05221) need, and set the results beside the published numbers. "
    "What is finished is skipped, and what was stopped resumes: the same command continues. Data are read from the "
    "folder that TTALIGHT_DATA names."
)


def main(args: Sequence[str] | None = None, command: Command | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after ``ttalight reproduce``; those of the process by default.
        command: Runs the words after ``ttalight`` and returns an exit code; in a process of its own by default.

    Raises:
        ArgumentError: If the words are wrong.
        FileNotFoundError: If the configurations are missing.
        RuntimeError: If a run fails.
        ValueError: If the words do not belong together, or a folder of runs is not this plan's.
    """
    options = _parse(args)
    data = _data(options)
    root = Path(options.output) / options.recipe / data
    methods = tuple(options.methods) if options.methods else None
    planner = Planner(options.recipe, data, root, options.budget, methods, options.generate, options.pretrained)
    plan = planner.plan(options.table)
    states = {job.name: state(job, root) for job in plan.jobs}
    if options.table != 3 and not options.report:
        given = options.images_per_second
        rate, how = (probe(plan), "by a probe") if given is None else (given, "as given")
        sys.stdout.write(plan_text(plan, states, rate, how))
        sys.stdout.flush()
        if options.dry_run:
            return
        for job in plan.jobs:
            if job.verb != "adapt" or not options.fit_only:
                execute(job, root, command or _subprocess)
    _write_table(plan, root, options.oracle)


def _parse(args: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="ttalight reproduce", description=_ABOUT, exit_on_error=False, allow_abbrev=False)
    about = "; ".join(f"{name}: {recipe.about}" for name, recipe in RECIPES.items())
    parser.add_argument("--table", type=Literal[1, 2, 3, 4, 5, 6], required=True, help="Number of the table.")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="paper", help=f"Scale of the runs. {about}.")
    parser.add_argument(
        "--data", choices=tuple(DATA), help="Data set; that of the table by default, cifar10 for 1 and 3."
    )
    parser.add_argument("--budget", choices=("matched", "paper"), default="matched", help="Training of other methods.")
    parser.add_argument("--methods", nargs="+", type=str, metavar="METHOD", help=f"Some of {', '.join(METHODS)}.")
    parser.add_argument("--output", type=str, default="runs/reproduce", help="Folder of all runs.")
    parser.add_argument("--images-per-second", type=float, help="Forward and backward of the network; else a probe.")
    parser.add_argument("--pretrained", type=str, metavar="FILE", help="Weights to begin with; else timm downloads.")
    flags = {
        "generate": "Make corruptions from the clean images.",
        "oracle": "Add rows whose steps are chosen by test accuracy, labelled so.",
        "fit-only": "Train, and leave the adaptation to a later call.",
        "dry-run": "Print plan and estimate only.",
        "report": "Print the table from what is finished, run nothing.",
    }
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = parser.parse_args(None if args is None else list(args))
    rate = options.images_per_second
    if rate is not None and not rate > 0:
        raise argparse.ArgumentError(None, f"--images-per-second must be positive, got {rate}")
    return options


def _data(options: Namespace) -> str:
    """Return the name of the data set."""
    if options.recipe == "demo":
        return options.data or "digits"
    usual = TABLE_DATA.get(options.table, "cifar10")
    if options.table in (4, 5) and options.data not in (None, usual):
        raise InputError(f"Table {options.table} is of {usual}: leave --data out, got {options.data}")
    return options.data or usual


def _subprocess(words: list[str]) -> int:
    child = subprocess.Popen([sys.executable, "-m", "ttalight", *words])
    # A child that is told to stop writes a checkpoint first.
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_table(plan: Plan, root: Path, oracle: bool) -> None:
    """Write and print the table from what is done, and its figure and the page."""
    done = {job.name for job in plan.jobs if job.verb == "adapt" and state(job, root) == "done"}
    text = render(plan, root, done, oracle)
    # Only these have rows of other methods; the two budgets lie side by side.
    own = "_paper" if plan.budget == "paper" and plan.table in (2, 4, 5) else ""
    write_files(root, {f"table{plan.table}{own}.md": text})
    sys.stdout.write("\n" + text)
    drawn = draw(plan, root, done)
    write_files(root, {"report.html": report(root)})
    for path in [*drawn, root / "report.html"]:
        sys.stdout.write(f"{path}\n")
