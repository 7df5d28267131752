"""Confidence intervals of differences of accuracies: a paired bootstrap over the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ttalight.errors import InputError
from ttalight.labels import UNLABELLED
from ttalight.reporting.groups import Run
from ttalight.reporting.predictions import PREDICTIONS, read_predictions

__all__ = ["DRAWS", "LEVEL", "gain_interval", "paired_interval"]

#: Probability that an interval stands for, and number of resamples behind it.
LEVEL = 0.95
DRAWS = 1000


def paired_interval(
    difference: npt.NDArray[np.float64],
    visit: npt.NDArray[np.integer[Any]],
    image: npt.NDArray[np.integer[Any]],
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over visits of a difference between two methods on the same images.

    Images are drawn with replacement, each with all its corrupted versions at once: these are no independent samples.
    B. Efron and R. J. Tibshirani, *An Introduction to the Bootstrap*, 1993.

    Args:
        difference: One method's score minus the other's, for every prediction, (N,).
        visit: Visit that the prediction belongs to, (N,); all count equally.
        image: Image that it is of, (N,).
        draws: Number of resamples.
        seed: Seed of the draws.

    Returns:
        Lower and upper end.
    """
    order = np.argsort(visit, kind="stable")
    scores, ordered = difference[order], visit[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    known, index = np.unique(image[order], return_inverse=True)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(generator.integers(len(known), size=len(known)), minlength=len(known))[index]
        counts = np.add.reduceat(times, starts)
        sums = np.add.reduceat(times * scores, starts)
        means[draw] = (sums[counts > 0] / counts[counts > 0]).mean()  # a short visit may have had no image drawn
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def gain_interval(own: Sequence[Run], other: Sequence[Run]) -> tuple[float, float]:
    """Interval of the gain in accuracy of some runs over others, from their predictions; seeds count as fixed.

    Predictions of the same image in the same visit of a domain belong together, in whatever order they came.

    Args:
        own: Runs of one method that differ in their seed.
        other: Runs of the other one.

    Returns:
        Lower and upper end, as fractions.

    Raises:
        FileNotFoundError: If a run has no predictions.
        ValueError: If predictions are damaged, not of the same images, or of images without labels.
    """
    visits = {name: index for index, name in enumerate(_visits(own[0]))}
    first = _aligned(own[0], visits)
    if (first["label"] == UNLABELLED).all():
        raise InputError(f"{own[0].name}/{PREDICTIONS} has no labels")
    scores = [_hits(runs, visits, first) for runs in (own, other)]
    probes = [index for index, row in enumerate(own[0].results["domains"]) if row.get("probe", False)]
    counts = ~np.isin(first["visit"], probes)
    if not counts.any():
        raise InputError(f"{own[0].name}/{PREDICTIONS} has predictions of probes only, which count in no mean")
    difference = (scores[0] - scores[1])[counts]
    return paired_interval(difference, first["visit"][counts], first["sample"][counts])


def _visits(run: Run) -> list[tuple[str, int | None, int]]:
    """Name every row of a run, in whatever order the domains came: domain, severity, how often it came before."""
    before: Counter[tuple[str, int | None]] = Counter()
    names = []
    for row in run.results["domains"]:
        place = (row["name"], row["severity"])
        names.append((*place, before[place]))
        before[place] += 1
    return names


def _aligned(run: Run, visits: Mapping[tuple[str, int | None, int], int]) -> dict[str, npt.NDArray[Any]]:
    """Read the predictions of a run, sorted by visit and image, where ``visits`` numbers the visits."""
    found = read_predictions(run.file.with_name(PREDICTIONS), "visit", "sample", "label", "prediction")
    numbers = np.array([visits.get(name, -1) for name in _visits(run)])
    if int(found["visit"].max()) >= len(numbers):
        raise InputError(f"{run.name}/{PREDICTIONS} has more visits than the run's results: repeat the run")
    found["visit"] = numbers[found["visit"]]
    order = np.lexsort((found["sample"], found["visit"]))
    return {name: values[order] for name, values in found.items()}


def _hits(
    runs: Sequence[Run], visits: Mapping[tuple[str, int | None, int], int], first: dict[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float64]:
    """Return for every prediction the fraction of seeds that got it right; of a dense one, of its pixels."""
    total: npt.NDArray[np.float64] = np.zeros(len(first["label"]))
    for run in runs:
        found = _aligned(run, visits)
        if any(not np.array_equal(found[name], first[name]) for name in ("visit", "sample", "label")):
            raise InputError(f"{run.name}/{PREDICTIONS} has other images than the run that it is compared with")
        right = found["prediction"] == found["label"]
        total += right.reshape(len(right), -1).mean(axis=1)
    return total / len(runs)
