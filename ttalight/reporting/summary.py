"""Summaries of the rows of a run: averages, the worst domain and group, rounds, forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from ttalight.reporting.results import (
    MEASURES,
    Averages,
    Digest,
    DomainResult,
    Forgetting,
    GroupResult,
    Measure,
    Round,
    Summary,
    Worst,
)

#: Families of corruptions as D. Hendrycks and T. Dietterich publish them: "Benchmarking Neural Network Robustness to
#: Common Corruptions and Perturbations", ICLR 2019, arXiv 1903.12261; the last of each is one of the four extra ones.
FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "frost_procedural", "fog", "brightness", "spatter"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
}
_FAMILY = {name: family for family, names in FAMILIES.items() for name in names}

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)


def summarize(domains: Sequence[DomainResult]) -> tuple[Summary, Summary]:
    """Average over the rows that are not probes.

    Args:
        domains: The rows.

    Returns:
        The mean that counts every row once and the mean that counts every sample once. A measure is None without
        rows, or if it is missing or not finite in any of them: a mean over fewer domains would look better or worse
        than it is. Measures that no row has are left out, but for the four that every file has.
    """
    rows = counted(domains)
    return average(rows, [1] * len(rows)), average(rows, [row["samples"] for row in rows])


def counted(domains: Iterable[DomainResult]) -> list[DomainResult]:
    """Return the rows that count in averages: those that are not probes."""
    return [row for row in domains if not row.get("probe", False)]


def average(rows: Sequence[DomainResult], weights: Sequence[int], measures: Sequence[Measure] = MEASURES) -> Summary:
    """Average measures with one weight a row; see :func:`summarize` for what is missing."""
    total = sum(weights)

    def mean(measure: Measure) -> float | None:
        values = [row.get(measure) for row in rows]
        known = [
            value * weight for value, weight in zip(values, weights, strict=True) if value is not None and finite(value)
        ]
        return math.fsum(known) / total if total and len(known) == len(rows) else None

    summary: Summary = {"accuracy": mean("accuracy"), "error": mean("error"), "nll": mean("nll"), "ece": mean("ece")}
    for name in measures:
        if name not in summary and any(row.get(name) is not None for row in rows):
            summary[name] = mean(name)
    return summary


def digest(rows: Sequence[DomainResult]) -> Digest:
    """Return the keys of a result file that follow from its rows: ``groups``, ``worst``, ``rounds``, ``forgetting``.

    Args:
        rows: The rows; ``rounds`` is there if a domain is visited again, ``forgetting`` if there are probes.
    """
    stream = counted(rows)
    found: Digest = {"groups": groups(stream)}
    lowest = worst(stream)
    if lowest is not None:
        found["worst"] = lowest
    if any(row["visit"] for row in stream):
        found["rounds"] = rounds(stream)
    probes = forgetting(rows)
    if probes:
        found["forgetting"] = probes
    return found


def groups(rows: Sequence[DomainResult]) -> list[GroupResult]:
    """Average over families of corruptions; a domain of another kind is a group of its own."""
    members = by(rows, lambda row: _FAMILY.get(row["name"], row["name"]))
    return [{"name": name, "rows": len(own), **_averages(own)} for name, own in members.items()]


def rounds(rows: Sequence[DomainResult]) -> list[Round]:
    """Average over the rows of each round: the first, second, ... visits of the domains."""
    members = by(rows, lambda row: row["visit"])
    return [{"visit": visit, "rows": len(own), **_averages(own)} for visit, own in sorted(members.items())]


def worst(rows: Sequence[DomainResult]) -> Worst | None:
    """Find the domain and the group with the lowest accuracy; None unless every row has one."""
    if not rows or not all(finite(row["accuracy"]) for row in rows):
        return None
    domain, own = _lowest(by(rows, lambda row: row["name"]))
    group, family = _lowest(by(rows, lambda row: _FAMILY.get(row["name"], row["name"])))
    return {"domain": domain, "domain_accuracy": own, "group": group, "group_accuracy": family}


def forgetting(rows: Sequence[DomainResult]) -> list[Forgetting]:
    """Follow the accuracy on each domain that is probed, in the order of the stream."""
    probes = by([row for row in rows if row.get("probe", False)], lambda row: (row["name"], row["severity"]))
    return [_forgetting(name, severity, own) for (name, severity), own in probes.items()]


def _forgetting(name: str, severity: int | None, rows: Sequence[DomainResult]) -> Forgetting:
    values = [row["accuracy"] if finite(row["accuracy"]) else None for row in rows]
    known = [value for value in values if value is not None]
    first, last = values[0], values[-1]
    return {
        "name": name,
        "severity": severity,
        "probes": len(rows),
        "first": first,
        "last": last,
        "lowest": min(known) if known else None,
        "forgotten": None if first is None or last is None else first - last,
    }


def _lowest(members: dict[str, list[DomainResult]]) -> tuple[str, float]:
    means = {name: math.fsum(row["accuracy"] or 0.0 for row in own) / len(own) for name, own in members.items()}
    name = min(means, key=means.__getitem__)
    return name, means[name]


def _averages(rows: Sequence[DomainResult]) -> Averages:
    mean = average(rows, [1] * len(rows), MEASURES[:4])
    return {"accuracy": mean["accuracy"], "error": mean["error"], "nll": mean["nll"], "ece": mean["ece"]}


def finite(value: float | None) -> bool:
    """Return whether a value is there and finite."""
    return value is not None and math.isfinite(value)


def by(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Put items with equal keys together, in order of first appearance."""
    members: dict[_Key, list[_Item]] = {}
    for item in items:
        members.setdefault(key(item), []).append(item)
    return members
