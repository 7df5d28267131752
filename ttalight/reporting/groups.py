"""Finds runs and puts those that differ only in their seed together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttalight.errors import InputError, MissingFileError
from ttalight.reporting.overview import STREAM_FIELDS, progress, protocol_fields
from ttalight.reporting.results import Results, read_results
from ttalight.reporting.summary import by
from ttalight.reporting.text import plain

#: More settings than these in a row's label would not be read; the name of the run's folder is.
_LABEL_FIELDS = 2

#: Longest value in a message: of a hash, its beginning tells enough.
_SHORT = 16


@dataclass(frozen=True)
class Run:
    """A result file and what it holds."""

    file: Path
    results: Results

    @property
    def name(self) -> str:
        """The run's folder, or the file if it has another name than usual."""
        return (self.file.parent if self.file.name == "results.json" else self.file).as_posix()


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed or the order of their stream, or a single run: one row of a table."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Results:
        """The results that stand for what all runs of the group share."""
        return self.runs[0].results

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return all(run.results["complete"] for run in self.runs)

    @property
    def weights(self) -> int:
        """Number of different source weights."""
        return len({_weights(run) for run in self.runs})

    @property
    def streams(self) -> frozenset[str | None]:
        """Hashes of the streams: several where runs differ in the order of their stream."""
        return frozenset(run.results["protocol"]["stream_hash"] for run in self.runs)

    @property
    def repeats(self) -> str:
        """Noun for the differences between its runs."""
        if len(self.streams) == 1:
            return "seeds"
        return "stream orders" if len({run.results["seed"] for run in self.runs}) == 1 else "seeds and stream orders"

    @property
    def keys(self) -> list[tuple[int | None, str | None]]:
        """Name of each run in the group: its seed, and its stream where there are several."""
        several = len(self.streams) > 1
        return [(run.results["seed"], run.results["protocol"]["stream_hash"] if several else None) for run in self.runs]


def find_runs(paths: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read the runs in files and folders.

    Args:
        paths: Result files, folders of runs, or folders that hold such at any depth.

    Returns:
        The runs in the order of ``paths``, each once; and the paths without any, such as the folder of a training
        stage. Within a folder that holds several, runs of the unadapted network (method "Source") come first, then
        the others by name.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If result files cannot be read; names all of them.
    """
    files: dict[Path, tuple[Path, int]] = {}
    without = []
    for place, path in enumerate(map(Path, paths)):
        found = _result_files(path)
        if not found:
            without.append(path.as_posix())
        for file in found:
            files.setdefault(file.resolve(), (file, place))
    runs, errors = [], []
    for file, place in files.values():
        try:
            runs.append((place, Run(file, read_results(file))))
        except (OSError, ValueError) as error:
            errors.append(str(error))
    if errors:
        raise InputError("; ".join(errors))
    runs.sort(key=lambda found: (found[0], found[1].results["method"] != "Source"))
    return [run for _, run in runs], without


def _result_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".json" else []
    if not path.exists():
        raise MissingFileError(f"there is no {path}: give folders of runs, or a folder that holds them")
    own = path / "results.json"
    return [own] if own.is_file() else sorted(path.rglob("results.json"))


def stream_differences(runs: Sequence[Run]) -> dict[str, str]:
    """Find what forbids to set runs side by side: settings of the stream that are not equal.

    Args:
        runs: The runs.

    Returns:
        Field -> every value with the runs that have it.

    Raises:
        ValueError: If runs name the same stream but hold other domains, so that one of the files is not true.
    """
    for same in by(runs, lambda run: run.results["protocol"]["stream_hash"]).values():
        _check_domains([run for run in same if run.results["complete"] and run.results["protocol"]["stream_hash"]])
    differences = {}
    for field in STREAM_FIELDS:
        values = by(runs, lambda run, field=field: json.dumps(run.results["protocol"].get(field)))  # type: ignore[misc]
        if field == "data":
            values.pop("null", None)  # of a file that does not say it yet
        if len(values) > 1:
            differences[field] = ", ".join(
                f"{plain(json.loads(value))[:_SHORT] or 'none'} in {_list([run.name for run in members])}"
                for value, members in values.items()
            )
    return differences


def _check_domains(runs: Sequence[Run]) -> None:
    def rows(run: Run) -> Any:
        return [(row["name"], row["severity"], row["visit"], row["samples"]) for row in run.results["domains"]]

    odd = next((run for run in runs if rows(run) != rows(runs[0])), None)
    if odd is not None:
        raise InputError(
            f"{runs[0].name} and {odd.name} have the same stream_hash but not the same domains and samples: "
            "one of them saw only part of the stream or was edited; repeat it"
        )


def group_runs(
    runs: Sequence[Run], across_weights: bool = False, across_streams: bool = False
) -> tuple[list[Group], list[str]]:
    """Put runs of the same method, protocol and source weights with different seeds together.

    If one seed occurs twice on a stream, something else differs that the files do not say: then each run stays alone.
    So does a run that is not complete.

    Args:
        runs: The runs.
        across_weights: Put runs together although their source weights differ, where task and network are the same:
            every seed has trained its own.
        across_streams: Put runs together although the hashes of their streams differ, where the streams are of one
            kind with the same arguments: they differ in their seed.

    Returns:
        The groups in the order of their first run; and a remark for each set of runs that was not averaged.
    """
    members: list[tuple[Run, ...]] = []
    remarks = []
    for same in by(runs, lambda run: _identity(run, across_weights, across_streams)).values():
        if len(set(Group("", tuple(same)).keys)) == len(same):
            members.append(tuple(same))
        else:
            members.extend((run,) for run in same)
            names = _list([f"{run.name} (seed {plain(run.results['seed'])})" for run in same])
            remarks.append(f"not averaged, since a seed occurs twice: {names}")
    order = {run.file: index for index, run in enumerate(runs)}
    members.sort(key=lambda group: order[group[0].file])
    labels = _labels(members, across_weights)
    return [Group(label, group) for label, group in zip(labels, members, strict=True)], remarks


def _identity(run: Run, across_weights: bool, across_streams: bool) -> str:
    results = run.results
    # The arguments of a stream are in its hash, and in newer files only.
    left = "stream_hash" if across_streams else "stream_args"
    protocol = {name: value for name, value in results["protocol"].items() if name != left}
    source: Any = [results.get("model"), results.get("network")] if across_weights else _weights(run)
    alone = None if results["complete"] else run.name
    return json.dumps([results["method"], protocol, source, alone], sort_keys=True)


def _weights(run: Run) -> str | None:
    return run.results["source"]["sha256"] or run.results["source"]["file"]


def _labels(members: Sequence[tuple[Run, ...]], across_weights: bool) -> list[str]:
    """Name groups by their method and, where it has several, by what differs between them."""
    methods = by((group[0] for group in members), lambda run: run.results["method"])
    labels = {}
    for method, rivals in methods.items():
        for run, distinction in zip(rivals, _distinctions(rivals, across_weights), strict=True):
            unfinished = "" if run.results["complete"] else f" (partial, {progress(run.results)})"
            labels[run.file] = method + (f" ({distinction})" if distinction else "") + unfinished
    return [labels[group[0].file] for group in members]


def _distinctions(runs: Sequence[Run], across_weights: bool) -> list[str]:
    """Tell runs of one method apart: by one or two settings, else by the shortest of folder name and path."""
    if len(runs) == 1:
        return [""]
    fields = [protocol_fields(run.results) for run in runs]
    names = dict.fromkeys(name for own in fields for name in own if not (across_weights and name == "source"))
    differing = [name for name in names if len({own.get(name) for own in fields}) > 1]
    settings = [", ".join(f"{name} {own.get(name) or 'none'}" for name in differing) for own in fields]
    folders = [Path(run.name).name for run in runs]
    choices = [settings] if len(differing) <= _LABEL_FIELDS else []
    return next((choice for choice in [*choices, folders] if len(set(choice)) == len(runs)), [run.name for run in runs])


def _list(names: Sequence[str], most: int = 4) -> str:
    rest = len(names) - most
    return " ".join(names) if rest <= 0 else f"{' '.join(names[:most])} and {rest} more"
