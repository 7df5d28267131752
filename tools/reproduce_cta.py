"""Run what the tables of CTA's paper need, and print them beside the published numbers.

    python tools/reproduce_cta.py --table 2 [--recipe paper|small|lite0|demo] [--data cifar10|cifar100|tiny_imagenet]
                                  [--budget matched|paper] [--methods CTA CTA-C ...] [--output runs/reproduce]
                                  [--images-per-second N] [--pretrained FILE] [--generate] [--oracle]
                                  [--fit-only] [--dry-run | --report]

S. Barbeau et al., CTA: Cross-Task Alignment for Better Test Time Training, arXiv 2507.05221. Tables 1, 2, 4, 5 and 6
train and adapt, Table 3 compares settings. Data are read from the folder that TTALIGHT_DATA names.

First the plan and an estimate of the time are printed: from --images-per-second (images in a second through a forward
and a backward), or from a probe of a few seconds. Then each run is a command of its own; its configuration is in
<output>/<recipe>/<data>/plans. What is finished is skipped, whatever stopped: training goes on from its last epoch,
adaptation in the middle of its stream. The same command again goes on. Runs are shared between tables. What started
from a file that was made anew since, by its SHA-256, begins anew as well.

The table goes to <output>/<recipe>/<data>/table<N>.md (table<N>_paper.md with --budget paper); after Table 1 follows
its figure (accuracy against temperature), after Tables 2, 4 and 5 Figure 3 (accuracy against steps, control dashed),
after Table 6 Figure 2 (t-SNE), as PNG, SVG and into TensorBoard, where matplotlib and scikit-learn are installed (pip
install 'ttalight[analysis]'). All tables and figures that are there make up report.html.

Source training of other methods has the budget of the paper's Table 3 (matched) or that of their authors (paper); see
configs/cifar10_matched and configs/cifar10_paper. Nothing is chosen by test labels, but for the rows that --oracle adds
and labels so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from cta_plan import DATA, METHODS, RECIPES, TABLE_DATA, Job, Plan, Planner, made_by
from cta_tables import render, report, sweep_figure

from ttalight.analysis import can_embed, feature_panels, read_features, tsne_figure
from ttalight.files.atomic import write_files
from ttalight.files.checkpoints import LAST, PREVIOUS, last_whole
from ttalight.models import create_encoder
from ttalight.reporting import read_results
from ttalight.reporting.figures import can_plot, iterations_figure, save_figure
from ttalight.tasks.checkpoint import file_sha256, read_checkpoint

Command = Callable[[list[str]], int]


def main(words: Sequence[str] | None = None, command: Command | None = None) -> None:
    """Run the command line; ``command`` runs the words after ``ttalight`` and returns an exit code."""
    options = _parse(words)
    if options.table in TABLE_DATA and options.recipe != "demo":
        wanted = options.data or TABLE_DATA[options.table]
        if options.table in (4, 5) and wanted != TABLE_DATA[options.table]:
            raise SystemExit(f"Table {options.table} is of {TABLE_DATA[options.table]}: leave --data out")
        options.data = wanted
    data = options.data or ("digits" if options.recipe == "demo" else "cifar10")
    root = Path(options.output) / options.recipe / data
    methods = tuple(options.methods) if options.methods else None
    try:
        planner = Planner(options.recipe, data, root, options.budget, methods, options.generate, options.pretrained)
        plan = planner.plan(options.table)
        states = {job.name: state(job, root) for job in plan.jobs}
    except ValueError as error:
        raise SystemExit(f"reproduce_cta.py: error: {error}") from None
    if options.table != 3 and not options.report:
        _print_plan(plan, states, options)
        if options.dry_run:
            return
        for job in plan.jobs:
            if job.verb != "adapt" or not options.fit_only:
                execute(job, root, command or _subprocess)
    done = {job.name for job in plan.jobs if job.verb == "adapt" and state(job, root) == "done"}
    text = render(plan, root, done, options.oracle)
    # Only these have rows of other methods; the two budgets lie side by side.
    own = "_paper" if plan.budget == "paper" and plan.table in (2, 4, 5) else ""
    write_files(root, {f"table{plan.table}{own}.md": text})
    sys.stdout.write("\n" + text)
    drawn = draw(plan, root, done)
    write_files(root, {"report.html": report(root)})
    for path in [*drawn, root / "report.html"]:
        sys.stdout.write(f"{path}\n")


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce_cta.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "; ".join(f"{name}: {recipe.about}" for name, recipe in RECIPES.items())
    parser.add_argument("--table", type=int, choices=range(1, 7), required=True, help="Number of the table.")
    parser.add_argument("--recipe", choices=RECIPES, default="paper", help=f"Scale of the runs. {about}.")
    parser.add_argument("--data", choices=DATA, help="Data set; that of the table by default, cifar10 for 1 and 3.")
    parser.add_argument("--budget", choices=("matched", "paper"), default="matched", help="Training of other methods.")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"Some of {', '.join(METHODS)}.")
    parser.add_argument("--output", default="runs/reproduce", help="Folder of all runs.")
    parser.add_argument("--images-per-second", type=float, help="Forward and backward of the network; else a probe.")
    parser.add_argument("--pretrained", metavar="FILE", help="Weights to begin with; else timm downloads them.")
    parser.add_argument("--generate", action="store_true", help="Make corruptions from the clean images.")
    parser.add_argument("--oracle", action="store_true", help="Add rows whose steps are chosen by test accuracy.")
    parser.add_argument("--fit-only", action="store_true", help="Train, and leave the adaptation to a later call.")
    parser.add_argument("--dry-run", action="store_true", help="Print plan and estimate only.")
    parser.add_argument("--report", action="store_true", help="Print the table from what is finished, run nothing.")
    options = parser.parse_args(words)
    if options.images_per_second is not None and not options.images_per_second > 0:
        parser.error(f"--images-per-second must be positive, got {options.images_per_second}")
    return options


# -- the state of a job


def state(job: Job, root: Path) -> str:
    """Return ``done``, ``goes on``, ``anew`` (a file it started from was made anew since) or ``to do``.

    Raises:
        ValueError: If there is a run of that name with another configuration, or one without a whole checkpoint.
    """
    path, run = _plan_file(job, root), root / job.name
    if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != job.config and run.is_dir():
        raise ValueError(
            f"{run} was run with another configuration than this plan has ({path}): give another --output, or take "
            "the folder away"
        )
    found = {"export": _export_state, "adapt": _adapt_state, "fit": _fit_state}[job.verb](job, run)
    return "anew" if found != "to do" and _is_outdated(job, root) else found


def _export_state(job: Job, run: Path) -> str:
    return "done" if run.is_file() else "to do"


def _adapt_state(job: Job, run: Path) -> str:
    try:
        return "done" if read_results(run)["complete"] else "goes on"
    except (FileNotFoundError, ValueError):
        return "goes on" if (run / "config.yaml").is_file() else "to do"


def _fit_state(job: Job, run: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fit itself says which one it goes on from
            whole = last_whole(run / "checkpoints")
    except ValueError as error:
        raise ValueError(f"{job.name} has no whole checkpoint: take {run} away to begin anew ({error})") from error
    if whole is None:
        return "to do"
    epochs = int(read_checkpoint(str(whole), job.name)["epoch"]) + 1
    return "done" if whole.name == LAST and epochs >= job.config["trainer"]["max_epochs"] else "goes on"


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

    Raises:
        SystemExit: If it fails.
    """
    found = state(job, root)
    if found == "done":
        return
    sys.stdout.write(f"{job.verb} {job.name} ({found})\n")
    sys.stdout.flush()
    if (
        found == "anew"
    ):  # before what it starts from is noted: whatever stops this, the old run is not taken for the new
        _forget(job, root)
    texts = {_plan_file(job, root).name: yaml.safe_dump(job.config, sort_keys=False)}
    if found != "goes on":
        started = {name: _sha256(made_by(name, root)) for name in job.reads if made_by(name, root).is_file()}
        texts[_started_file(job, root).name] = json.dumps(started, indent=2) + "\n"
    write_files(root / "plans", texts)
    if job.verb == "export":
        _export(job, root)
        return
    words = [job.verb, "--config", str(_plan_file(job, root))]
    if found == "goes on":
        words += ["--ckpt_path", "last"] if job.verb == "fit" else ["--resume", str(root / job.name)]
    else:
        words += ["--overwrite"]  # what a run left that had not begun, or that began from another file
    code = command(words)
    if code:
        raise SystemExit(f"{job.verb} {job.name} stopped with code {code}; the same command goes on from here")


def _forget(job: Job, root: Path) -> None:
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


def _subprocess(words: list[str]) -> int:
    child = subprocess.Popen([sys.executable, "-m", "ttalight", *words])
    # A child that is told to stop writes a checkpoint first.
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


# -- the estimate


def _print_plan(plan: Plan, states: dict[str, str], options: argparse.Namespace) -> None:
    rate = options.images_per_second
    how = "as given"
    if rate is None:
        rate, how = probe(plan), "by a probe"
    total = 0.0
    for job in plan.jobs:
        if states[job.name] != "to do" and any(states[other] != "done" for other in job.reads):
            states[job.name] = "anew"  # unless the same file comes out
        seconds = 0.0 if states[job.name] == "done" else job.passes / 3 / rate
        total += seconds
        reads = f"  reads {', '.join(job.reads)}" if job.reads else ""
        sys.stdout.write(f"{states[job.name]:8} {job.verb:6} {job.name:32} {_duration(seconds):>9}{reads}\n")
    sys.stdout.write(
        f"{len(plan.jobs)} runs, about {_duration(total)} at {rate:,.0f} images/s forward and backward ({how}), "
        "without reading and making images\n"
    )
    sys.stdout.flush()


def probe(plan: Plan, seconds: float = 3.0) -> float:
    """Return how many images a second the plan's network takes forward and backward, here and now."""
    config = next(job.config for job in plan.jobs if job.verb == "fit")
    arguments, trainer = config["model"]["init_args"], config["trainer"]
    device = "cuda" if torch.cuda.is_available() and trainer.get("accelerator") != "cpu" else "cpu"
    encoder = create_encoder(arguments["encoder"], stem=arguments.get("stem", "cifar")).to(device)
    size = 256 if device == "cuda" else 32
    images = torch.rand(size, 3, DATA[plan.data][2], DATA[plan.data][2], device=device)
    if arguments.get("channels_last"):
        encoder = encoder.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    mixed = "bf16" in str(trainer.get("precision"))

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            features = encoder(images)
        features.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < seconds:
        step()
        steps += 1
    return size * steps / (time.perf_counter() - began)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


# -- figures


def draw(plan: Plan, root: Path, done: set[str]) -> list[Path]:
    """Draw the figure that belongs to a table, where its runs are done and the packages for it installed."""
    jobs = {row.label: row.jobs[0] for row in plan.rows}
    figure: Any = None
    run = jobs.get("CTA", "")
    if plan.table == 1 and can_plot() and any(row.jobs[0] in done for row in plan.rows if row.temperature):
        name, run = "table1", plan.rows[-1].jobs[0]
        figure = sweep_figure(plan, root, done)
    elif plan.table in (2, 4, 5) and can_plot() and run in done:
        name = "figure3"
        control = jobs["aligned, EMABN"]
        figure = iterations_figure(read_results(root / run), read_results(root / control) if control in done else None)
    elif plan.table == 6 and can_plot() and can_embed() and {jobs["Y"], jobs["CTA"]} <= done:
        name = "figure2"
        models = {label: read_features(root / job) for label, job in jobs.items()}
        target = next(domain for domain in models["CTA"] if domain != "clean")
        smallest = min(len(own.labels) for domains in models.values() for own in domains.values())
        figure = tsne_figure(feature_panels(models, target=target), perplexity=min(30.0, (smallest - 1) / 3))
    if figure is None:
        return []
    from torch.utils.tensorboard import SummaryWriter

    save_figure(figure, root, name)
    with SummaryWriter(str(root / run)) as writer:
        writer.add_figure(name, figure)
    return [root / f"{name}.{kind}" for kind in ("png", "svg")]


if __name__ == "__main__":
    main()
