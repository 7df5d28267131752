"""One run as text: what was run, and its numbers a domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ttalight.reporting.results import DomainResult, Results
from ttalight.reporting.text import enumerate_fields, number, plain, text_blocks, wrap

#: Settings that say which images arrived in which order; a table needs them equal in all its rows.
STREAM_FIELDS = ("stream", "stream_hash", "severity", "samples")


def protocol_fields(results: Results) -> dict[str, str]:
    """Write every setting of a run, and where its source weights came from, as short text.

    Args:
        results: The run.

    Returns:
        Name -> text, empty where a setting does not apply; hashes by their first 8 digits.
    """
    fields = {name: plain(value) for name, value in results["protocol"].items()}
    fields["stream_hash"] = fields["stream_hash"][:8]
    file, digest = results["source"]["file"], results["source"]["sha256"]
    fields["source"] = " ".join(filter(None, [Path(file).as_posix() if file else None, digest and digest[:8]]))
    return {"model": results["model"]} | fields if "model" in results else fields


def protocol_header(results: Results) -> str:
    """Say what was run: one paragraph on the stream and one on the method.

    Args:
        results: The run.

    Returns:
        Two paragraphs, each on a line of its own unless wider than the terminal.
    """
    fields = protocol_fields(results)
    stream = {name: fields.pop(name) for name in STREAM_FIELDS} | {"seed": plain(results["seed"])}
    unfinished = "" if results["complete"] else f" (unfinished, {progress(results)})"
    first = f"{results['method']}{unfinished}: {enumerate_fields(stream)}"
    return "\n".join(wrap(line) for line in (first, enumerate_fields(fields)) if line)


def progress(results: Results) -> str:
    """Say how much of its stream a run has seen, in images."""
    seen = sum(row["samples"] for row in results["domains"])
    return f"{seen}/{plain(results['protocol']['samples']) or '?'} images"


def domain_table(results: Results) -> str:
    """Tabulate the visits of one run: accuracy and calibration error in percent, NLL in nats, images per second.

    A run with readings has a column of accuracies for each number of steps.

    Args:
        results: The run.

    Returns:
        Aligned lines; the last is the mean over rows.
    """
    rows = results["domains"]
    readings = results.get("readings", [])
    header = ["domain", "images", *(f"{reading['steps']} steps" for reading in readings), "accuracy %", "nll", "ece %", "images/s"]
    early = [[_percent(row["accuracy"]) for row in [*reading["domains"], reading["mean"]]] for reading in readings]
    at = list(zip(*early, strict=True)) if early else [()] * (len(rows) + 1)
    cells = [
        [name, str(row["samples"]), *read, *_measures(row["accuracy"], row["nll"], row["ece"], row["images_per_second"])]
        for name, row, read in zip(visit_names(rows), rows, at, strict=False)
    ]
    mean, cost = results["mean"], results["cost"]
    total = str(sum(row["samples"] for row in rows))
    last = ["mean", total, *at[-1], *_measures(mean["accuracy"], mean["nll"], mean["ece"], cost["images_per_second"])]
    return "\n".join(text_blocks(header, [*cells, last]))


def _measures(accuracy: float | None, nll: float | None, ece: float | None, speed: float | None) -> list[str]:
    return [_percent(accuracy), number(nll, 3), _percent(ece), number(speed, 0)]


def _percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def domain_names(rows: Sequence[DomainResult]) -> dict[tuple[str, int | None], str]:
    """Name the domains of any number of runs, ``name`` or, where a name has several severities, ``name-severity``.

    Args:
        rows: Rows of all runs together.

    Returns:
        (name, severity) -> text, in order of first appearance.
    """
    places = list(dict.fromkeys((row["name"], row["severity"]) for row in rows))
    severities = Counter(name for name, _ in places)
    return {place: f"{place[0]}-{plain(place[1])}" if severities[place[0]] > 1 else place[0] for place in places}


def visit_names(rows: Sequence[DomainResult]) -> list[str]:
    """Name the rows of one run; where a domain is visited again, the names count its visits from 1.

    Args:
        rows: Rows of one run.

    Returns:
        One name a row.
    """
    domains = domain_names(rows)
    visits = Counter((row["name"], row["severity"]) for row in rows)
    names = []
    for row in rows:
        place = (row["name"], row["severity"])
        names.append(domains[place] + (f" visit {row['visit'] + 1}" if visits[place] > 1 else ""))
    return names
