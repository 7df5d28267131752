"""Class separation and distance to the source, by domain: the rows of ``geometry.json``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ttalight.analysis.clusters import davies_bouldin, median_distance
from ttalight.analysis.features import Features
from ttalight.errors import InputError, MissingFileError
from ttalight.files.atomic import write_files
from ttalight.reporting.summary import by

__all__ = ["Distance", "GeometryRow", "MeanGeometry", "geometry", "mean_geometry", "read_geometry", "write_geometry"]

_FILE = "geometry.json"
_SCHEMA = 1

#: The domain that no mean over corruptions counts.
CLEAN = "clean"


class Distance(TypedDict):
    """See ``MedianDistance``."""

    mean: float
    total: float
    relative: float


class _Geometry(TypedDict):
    place: str
    steps: int
    davies_bouldin: float | None
    distances: dict[str, Distance]


class GeometryRow(_Geometry):
    """The features of one domain at one place after so many steps.

    ``davies_bouldin`` is None where classes are too few. ``distances`` has what the features were compared with:
    ``source``, the task's own features of training images, and ``supervised``, those of the model that the classifier
    was trained with.
    """

    domain: str
    samples: int


class MeanGeometry(_Geometry):
    """The mean over domains of a place after so many steps."""

    domains: int


def geometry(
    domain: str, features: Features, references: Mapping[str, Mapping[str, Tensor]] | None = None
) -> list[GeometryRow]:
    """Measure the features of a domain.

    Args:
        domain: Name of the domain.
        features: Its features.
        references: Name of a reference -> place -> class medians, (C, D); features of a place are compared with those
            of the same place.

    Returns:
        One row for each place and number of steps.
    """
    rows: list[GeometryRow] = []
    for (place, steps), values in features.values.items():
        found = {
            name: median_distance(values, features.labels, medians[place])
            for name, medians in (references or {}).items()
            if place in medians
        }
        distances: Any = {name: distance._asdict() for name, distance in found.items() if distance is not None}
        separable = 1 < len(torch.unique(features.labels)) < len(features.labels)
        rows.append(
            {
                "domain": domain,
                "samples": len(features.labels),
                "place": place,
                "steps": steps,
                "davies_bouldin": davies_bouldin(values, features.labels) if separable else None,
                "distances": distances,
            }
        )
    return rows


def mean_geometry(rows: Sequence[GeometryRow]) -> list[MeanGeometry]:
    """Average over domains, ``clean`` left out, for each place and number of steps.

    A value that a domain lacks is missing in the mean: it would be one over fewer domains.
    """
    groups = by([row for row in rows if row["domain"] != CLEAN], lambda row: (row["place"], row["steps"]))
    return [_mean(place, steps, own) for (place, steps), own in groups.items()]


def _mean(place: str, steps: int, rows: Sequence[GeometryRow]) -> MeanGeometry:
    indices = [row["davies_bouldin"] for row in rows]
    known = [value for value in indices if value is not None and math.isfinite(value)]
    names = [name for name in rows[0]["distances"] if all(name in row["distances"] for row in rows)]
    distances: Any = {
        name: {
            field: statistics.fmean(dict(row["distances"][name])[field] for row in rows)  # type: ignore[misc]
            for field in Distance.__annotations__
        }
        for name in names
    }
    return {
        "place": place,
        "steps": steps,
        "domains": len(rows),
        "davies_bouldin": statistics.fmean(known) if len(known) == len(rows) else None,
        "distances": distances,
    }


def write_geometry(folder: str | Path, rows: Sequence[GeometryRow]) -> None:
    """Write ``geometry.json``: the rows and their means.

    Args:
        folder: The run's folder.
        rows: The rows.

    Raises:
        OSError: If the folder is not writable.
    """
    content = {"schema": _SCHEMA, "rows": list(rows), "mean": mean_geometry(rows)}
    write_files(folder, {_FILE: json.dumps(content, indent=2, allow_nan=False) + "\n"})


def read_geometry(folder: str | Path) -> list[GeometryRow]:
    """Read the rows of ``geometry.json``.

    Args:
        folder: The run's folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another version.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise MissingFileError(f"no {path}: a run with a FeatureCollector writes it")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): repeat the run") from error
    version = content.get("schema") if isinstance(content, dict) else None
    if version != _SCHEMA:
        raise InputError(f"{path} has schema {version!r}, expected {_SCHEMA}: repeat the run")
    rows: list[GeometryRow] = content["rows"]
    return rows
