"""The result file of a run: its schema, and how it is written and read."""

from __future__ import annotations

import csv
import io
import json
import math
import reprlib
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict, get_args, get_type_hints

from ttalight.errors import InputError, MissingFileError
from ttalight.files.atomic import write_files
from ttalight.files.untrusted import LARGEST
from ttalight.reporting.text import csv_text
from ttalight.reporting.validation import check_curve, check_free, check_readings, check_value

SCHEMA = 1

#: Rows that are read, those of readings among them: minutes of work are refused in a moment.
_MOST_ROWS = 500_000
_TOO_MANY = f"more than {_MOST_ROWS:,} rows"

#: The measures that runs can be compared by.
Metric = Literal["accuracy", "error", "top5", "nll", "ece", "brier", "miou"]

#: All that is averaged over domains; every file has the first four.
Measure = Literal["accuracy", "error", "nll", "ece", "top5", "brier", "entropy", "diversity", "agreement", "miou"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class _Row(TypedDict):
    name: str
    severity: int | None
    visit: int
    samples: int
    accuracy: float | None
    error: float | None
    top5: float | None
    nll: float | None
    ece: float | None
    seconds: float | None
    images_per_second: float | None


class DomainResult(_Row, total=False):
    """One visit of a domain.

    Fractions in [0, 1], ``brier`` in [0, 2], ``nll`` and ``entropy`` in nats; None is not finite, or ``top5`` of five
    classes, and all measures but ``entropy``, ``diversity`` and ``agreement`` where images have no labels.
    ``agreement``, there only then, is the share of predictions that are the source model's. ``miou`` and ``iou``, the
    intersection over union of every class (None where a class does not occur), are there for dense predictions only.
    ``start`` counts the images of the stream before the visit; a ``probe`` is a look at clean data that no mean counts.
    """

    brier: float | None
    entropy: float | None
    diversity: float | None
    agreement: float | None
    miou: float | None
    iou: list[float | None]
    start: int
    probe: bool


class Averages(TypedDict):
    """The averages that every file has."""

    accuracy: float | None
    error: float | None
    nll: float | None
    ece: float | None


class Summary(Averages, total=False):
    """Averages over rows."""

    top5: float | None
    brier: float | None
    entropy: float | None
    diversity: float | None
    agreement: float | None
    miou: float | None


class _ByClass(Summary, total=False):
    iou: list[float | None]


class Overall(_ByClass):
    """The measures of all images of the stream, probes left out, as if they were one domain."""

    samples: int


class GroupResult(Averages):
    """Averages over the rows of one group of domains, ``rows`` many."""

    name: str
    rows: int


class Round(Averages):
    """Averages over the rows that are the ``visit``-th visit of their domain, ``rows`` many."""

    visit: int
    rows: int


class Worst(TypedDict):
    """The domain and the group of domains with the lowest accuracy, averaged over their rows."""

    domain: str
    domain_accuracy: float
    group: str
    group_accuracy: float


class Forgetting(TypedDict):
    """Accuracy on the probes of one domain: at the first, the last and the worst; first minus last is ``forgotten``."""

    name: str
    severity: int | None
    probes: int
    first: float | None
    last: float | None
    lowest: float | None
    forgotten: float | None


class Curve(TypedDict):
    """Accuracy along the stream, probes left out, in at most 200 stretches.

    ``images`` counts them to the end of each stretch, ``accuracy`` is the one in the stretch, ``running`` the one from
    the beginning of the stream.
    """

    images: list[int]
    accuracy: list[float | None]
    running: list[float | None]


class _Protocol(TypedDict):
    stream: str | None
    stream_hash: str | None
    severity: int | list[int] | None
    samples: int | None
    reset: str | int | None
    prediction: str | None
    batch_size: int | None
    steps: int | None
    optimizer: str | None
    lr: float | None
    norm: str | None
    sharding: str | None


class RunProtocol(_Protocol, total=False):
    """The settings that must be equal for numbers to be comparable, and those that a method or a data module adds.

    ``samples`` counts the images of the whole stream, ``stream_args`` are the arguments that the stream was built
    with, ``data`` names the data set.
    """

    stream_args: dict[str, Any]
    data: str


class Cost(TypedDict):
    """The costs of the run."""

    forwards_per_batch: float | None
    backwards_per_batch: float | None
    peak_memory_bytes: int | None
    images_per_second: float | None
    adapted_parameters: int | None


class Source(TypedDict):
    """The file that the source weights came from."""

    file: str | None
    sha256: str | None


class Reading(TypedDict):
    """Predictions after fewer steps on each batch. The rows are those of ``domains``, without times."""

    steps: int
    domains: list[DomainResult]
    mean: Summary


class Digest(TypedDict, total=False):
    """Numbers that follow from the rows."""

    groups: list[GroupResult]
    worst: Worst
    rounds: list[Round]
    forgetting: list[Forgetting]


class _Optional(Digest, total=False):
    model: str
    network: str
    classes: int
    bad_batches: int
    missed_batches: int
    missed: list[int]
    passes: dict[str, str]
    readings: list[Reading]
    overall: Overall
    curve: Curve


class Results(_Optional):
    """Everything that ``results.json`` holds; ``complete`` is False while domains are missing.

    ``network`` is the name of the encoder, ``classes`` the number of its outputs. ``bad_batches`` counts those that
    were predicted and not adapted to, where the adapter's ``on_bad_batch`` allows it. ``missed_batches`` counts those
    that a clock, ``adapt_every`` or ``max_milliseconds`` let be predicted only, ``missed`` lists their numbers in the
    stream. ``passes`` has the way that ``FastPass`` chose, and why, by the kind of pass.
    """

    schema: int
    complete: bool
    method: str
    seed: int | None
    protocol: RunProtocol
    domains: list[DomainResult]
    mean: Summary
    weighted_mean: Summary
    cost: Cost
    source: Source
    environment: dict[str, Any]


def write_results(folder: str | Path, results: Results) -> None:
    """Write ``results.json`` and ``domains.csv``, the latter with one line for every row of ``domains``.

    Strict JSON: what is not finite becomes null.

    Args:
        folder: The run's folder.
        results: What to write.

    Raises:
        OSError: If the disk is full or the folder not writable; names the path, and earlier files are untouched.
    """
    plain = _finite(results)
    text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
    table = io.StringIO()
    present = set(_Row.__annotations__).union(*plain["domains"])
    columns = [name for name in get_type_hints(DomainResult) if name in present and name != "iou"]  # no list is a cell
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "name": csv_text(row["name"])} for row in plain["domains"])
    # The JSON file comes last: it is the one that says how far the run got.
    write_files(folder, {"domains.csv": table.getvalue(), "results.json": text})


def read_results(path: str | Path) -> Results:
    """Read and check a result file.

    Args:
        path: ``results.json``, or the folder that holds it.

    Returns:
        The results; keys that this version does not know are kept.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, not strict JSON, of another schema, longer than 256 MiB or 500,000 rows, or keys
            are missing, of wrong types or out of their range.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise MissingFileError(f"no {path}: give the folder of a run that adapt, test or validate has written")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path} is not read: it has {path.stat().st_size:,} bytes, expected at most {LARGEST:,}")
    content = path.read_bytes()
    if content.count(b'"images_per_second"') > _MOST_ROWS:  # every row has one
        raise InputError(f"{path} is not read: it has {_TOO_MANY}")
    try:
        results = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a result file, it is damaged or not JSON ({error}): repeat the run") from error
    version = results.get("schema") if isinstance(results, dict) else None
    if version != SCHEMA:
        raise InputError(
            f"{path} has schema {reprlib.repr(version)}, this version of ttalight reads schema {SCHEMA}: "
            "repeat the run or use the version of ttalight that wrote it"
        )
    try:
        _check(results)
    except ValueError as error:
        raise InputError(f"{path} does not follow schema {SCHEMA}: {error}; repeat the run") from error
    checked: Results = results
    return checked


def _check(results: dict[str, Any]) -> None:
    if isinstance(results.get("domains"), list) and len(results["domains"]) > _MOST_ROWS:
        raise InputError(_TOO_MANY)
    for name, value in results.items():
        if name not in ("domains", "readings"):  # which have a fixed form
            check_free(value, name)
    check_value(results, Results)
    if "curve" in results:
        check_curve(results["curve"])
    check_readings(results.get("readings", []), len(results["domains"]))


def _finite(value: Any) -> Any:
    """Copy a tree of plain values with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a JSON value")
