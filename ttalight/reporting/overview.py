"""One run as text: what was run, and its numbers a domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ttalight.reporting.results import DomainResult, Forgetting, Results, Summary
from ttalight.reporting.summary import average, by, counted
from ttalight.reporting.text import enumerate_fields, number, plain, printable, text_blocks, wrap

#: Settings that say which images arrived in which order; a table needs them equal in all its rows.
STREAM_FIELDS = ("data", "stream", "stream_hash", "severity", "samples")


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
    names = {"model": results.get("model", ""), "network": results.get("network", "")}
    if names["network"] == names["model"]:
        del names["network"]  # a module of the user's, whose network has no name
    return {name: value for name, value in names.items() if value} | fields


def protocol_header(results: Results) -> str:
    """Say what was run: one paragraph on the stream and one on the method.

    Args:
        results: The run.

    Returns:
        Two paragraphs, each on a line of its own unless wider than the terminal.
    """
    fields = protocol_fields(results)
    stream = {name: fields.pop(name, "") for name in (*STREAM_FIELDS, "stream_args")}
    stream["seed"] = plain(results["seed"])
    unfinished = "" if results["complete"] else f" (unfinished, {progress(results)})"
    first = f"{results['method']}{unfinished}: {enumerate_fields(stream)}"
    return "\n".join(wrap(line) for line in (first, enumerate_fields(fields)) if line)


def progress(results: Results) -> str:
    """Say how much of its stream a run has seen, in images."""
    seen = sum(row["samples"] for row in results["domains"])
    return f"{seen}/{plain(results['protocol']['samples']) or '?'} images"


def domain_table(results: Results) -> str:
    """Tabulate the visits of one run: accuracy and calibration error in percent, NLL in nats, images per second.

    Dense predictions have the mean intersection over union beside the accuracy of the pixels.
    Without labels the columns are agreement with the source model and diversity in percent, and entropy in nats. A run
    with readings has a column of accuracies for each number of steps; one with very many visits has a line for each
    domain. Below the mean over rows stand the mean over images, where it is another one, and what the probes say.

    Args:
        results: The run.

    Returns:
        Aligned lines.
    """
    table = "\n".join(text_blocks(*domain_cells(results)))
    forgotten = map(forgetting_line, results.get("forgetting", []))
    return "\n".join([table, *forgotten, *missed_line(results), *pass_lines(results)])


def domain_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of :func:`domain_table`."""
    rows = by_domain(results["domains"])
    readings = results.get("readings", [])
    early = [[_percent(row["accuracy"]) for row in [*by_domain(read["domains"]), read["mean"]]] for read in readings]
    at = [list(cells) for cells in zip(*early, strict=True)] or [[] for _ in range(len(rows) + 1)]
    labelled = not rows or any(row["accuracy"] is not None for row in rows)
    dense = any("miou" in row for row in rows)
    measured = ("accuracy %", *(("mIoU %",) if dense else ()), "nll", "ece %")
    names = measured if labelled else ("agreement %", "entropy", "diversity %")
    header = ["domain", "images", *(f"{read['steps']} steps" for read in readings), *names]
    cells = [
        [name, str(row["samples"]), *read, *_measures(row, labelled, dense), number(row["images_per_second"], 0)]
        for name, row, read in zip(visit_names(rows), rows, at, strict=False)
    ]
    total = str(sum(row["samples"] for row in counted(results["domains"])))
    speed = number(results["cost"]["images_per_second"], 0)
    cells.append(["mean", total, *at[-1], *_measures(results["mean"], labelled, dense), speed])
    if results["weighted_mean"] != results["mean"] and len({row["samples"] for row in counted(rows)}) > 1:
        weighted = _measures(results["weighted_mean"], labelled, dense)
        cells.append(["weighted mean", total, *[""] * len(readings), *weighted, ""])
    return [*header, "images/s"], cells


def missed_line(results: Results) -> list[str]:
    """Say how many batches were predicted and not adapted to; nothing where all were to be."""
    if "missed_batches" not in results:
        return []
    return [f"missed: {results['missed_batches']} batches were predicted and not adapted to"]


def pass_lines(results: Results) -> list[str]:
    """Say in which way each kind of pass was computed, where there was a choice."""
    ways = results.get("passes", {})
    return [f"passes: {printable(kind)}: {printable(str(way))}" for kind, way in ways.items()]


def forgetting_line(found: Forgetting) -> str:
    """Say what the probes of one domain showed."""
    return (
        f"{printable(found['name'])}: accuracy {_percent(found['first'])} % at the first of {found['probes']} probes, "
        f"{_percent(found['last'])} % at the last, {_percent(found['lowest'])} % at the lowest; "
        f"forgotten {_percent(found['forgotten'])}"
    )


def by_domain(rows: Sequence[DomainResult], most: int = 60) -> list[DomainResult]:
    """Return the rows, or where they are too many to be read, one for each domain with its visits averaged.

    Args:
        rows: Rows of one run.
        most: How many can be read.
    """
    if len(rows) <= most:
        return list(rows)
    return [_join(own) for own in by(rows, lambda row: (row["name"], row["severity"], row.get("probe"))).values()]


def _join(rows: Sequence[DomainResult]) -> DomainResult:
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    samples, seconds = sum(row["samples"] for row in rows), sum(known) if len(known) == len(rows) else None
    joined: DomainResult = {**rows[0], **average(rows, [1] * len(rows))}
    joined.pop("iou", None)
    joined |= {"visit": 0, "samples": samples, "seconds": seconds}
    joined["images_per_second"] = samples / seconds if seconds else None
    return joined


def _measures(row: DomainResult | Summary, labelled: bool, dense: bool) -> list[str]:
    if not labelled:
        return [_percent(row.get("agreement")), number(row.get("entropy"), 3), _percent(row.get("diversity"))]
    regions = [_percent(row.get("miou"))] if dense else []
    return [_percent(row["accuracy"]), *regions, number(row["nll"], 3), _percent(row["ece"])]


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
    """Name the rows of one run; where a domain is visited or probed again, the names count these from 1.

    Args:
        rows: Rows of one run.

    Returns:
        One name a row.
    """
    domains = domain_names(rows)
    visits = Counter((row["name"], row["severity"]) for row in rows)
    probes: Counter[tuple[str, int | None]] = Counter()
    names = []
    for row in rows:
        place = (row["name"], row["severity"])
        if row.get("probe", False):
            probes[place] += 1
            names.append(f"{domains[place]} probe {probes[place]}")
        else:
            names.append(domains[place] + (f" visit {row['visit'] + 1}" if visits[place] > 1 else ""))
    return names
