"""Chooses hyper-parameters on the validation split, under corruptions that the test stream has not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any, TypedDict

from ttalight.data.corruptions import EXTRA
from ttalight.errors import InputError
from ttalight.files.atomic import write_files
from ttalight.reporting import read_results
from ttalight.reporting.summary import by, counted
from ttalight.reporting.text import number, text_blocks
from ttalight.sweep.grid import Sweep
from ttalight.sweep.runs import Job, read_config

__all__ = ["FILE", "Candidate", "candidate_table", "choose", "validation_jobs"]

FILE = "selection.json"
_FOLDER = "validation"


class Candidate(TypedDict):
    """An adapter with its arguments: mean accuracy over validation domains and runs, and whether it is chosen."""

    adapter: str
    candidate: str
    accuracy: float
    domains: dict[str, float]
    runs: int
    chosen: bool


def validation_jobs(sweep: Sweep) -> list[Job]:
    """Return the runs of a sweep's grid on the validation split under the extra corruptions.

    Raises:
        ArgumentError: If the parser refuses an option.
        ValueError: If the data module has no validation split.
    """
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    jobs = []
    for run in sweep.runs:
        data = tuple(word for word in run.words if word.startswith(("--config", "--data")))
        if data not in known:
            known[data] = _validation_words(read_config(data))
        name = f"{_FOLDER}/{run.name}"
        jobs.append(Job(name, sweep.folder / name, (*run.words, *known[data])))
    return jobs


def _validation_words(config: dict[str, Any]) -> tuple[str, ...]:
    data = config.get("data") or {}
    arguments = data.get("init_args") or {}
    if "stream_split" not in arguments:
        raise InputError(
            f"--select: the data module {data.get('class_path')} has no argument stream_split, so there are no "
            "validation images to choose hyper-parameters on: leave --select out, or use a data module of ttalight.data"
        )
    words = ("--data.init_args.stream_split=validation", f"--data.init_args.domains={json.dumps(list(EXTRA))}")
    # Published files have corrupted test images only.
    return (*words, "--data.init_args.generate=true") if "generate" in arguments else words


def choose(sweep: Sweep, jobs: Sequence[Job]) -> list[Candidate]:
    """Choose for each class of adapter the arguments with the best mean accuracy; of equal ones the first.

    The mean counts every domain of every run once. What was chosen goes to ``selection.json`` in the sweep's folder.

    Args:
        sweep: The sweep.
        jobs: Its validation runs, all of them finished.

    Raises:
        ValueError: If a run has no accuracy.
    """
    candidates: list[Candidate] = []
    pairs = [(run.candidate, read_results(job.folder)) for run, job in zip(sweep.runs, jobs, strict=True)]
    for own in by(pairs, lambda pair: (pair[1]["method"], pair[0])).values():
        values = [(row["name"], row["accuracy"]) for _, results in own for row in counted(results["domains"])]
        if any(accuracy is None for _, accuracy in values):
            raise InputError(f"--select: the images of {own[0][1]['protocol'].get('data')} have no labels to choose by")
        rows = [(name, float(accuracy or 0.0)) for name, accuracy in values]
        domains = {name: statistics.fmean(v for _, v in same) for name, same in by(rows, lambda row: row[0]).items()}
        candidates.append(
            {
                "adapter": own[0][1]["method"],
                "candidate": own[0][0],
                "accuracy": statistics.fmean(accuracy for _, accuracy in rows),
                "domains": domains,
                "runs": len(own),
                "chosen": False,
            }
        )
    for rivals in by(candidates, lambda candidate: candidate["adapter"]).values():
        max(rivals, key=lambda candidate: candidate["accuracy"])["chosen"] = True
    content = {"sweep": sweep.name, "split": "validation", "metric": "accuracy", "candidates": candidates}
    write_files(sweep.folder, {FILE: json.dumps(content, indent=2) + "\n"})
    return candidates


def candidate_table(candidates: Sequence[Candidate]) -> str:
    """Return accuracies on the validation split in percent, with a mark at what is chosen."""
    names = list(dict.fromkeys(name for candidate in candidates for name in candidate["domains"]))
    rows = []
    for candidate in candidates:
        accuracies = [
            number(100 * value) if (value := candidate["domains"].get(name)) is not None else "" for name in names
        ]
        mark = "chosen" if candidate["chosen"] else ""
        label = candidate["candidate"] or candidate["adapter"]
        rows.append([label, *accuracies, number(100 * candidate["accuracy"]), str(candidate["runs"]), mark])
    return "\n".join(text_blocks(["accuracy in %, validation", *names, "mean", "runs", ""], rows))
