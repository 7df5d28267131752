"""Confidence intervals of differences of accuracies: a paired bootstrap over the images."""

from __future__ import annotations

from collections.abc import Sequence
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

    Args:
        own: Runs of one method that differ in their seed.
        other: Runs of the other one.

    Returns:
        Lower and upper end, as fractions.

    Raises:
        FileNotFoundError: If a run has no predictions.
        ValueError: If predictions are damaged, not of the same images, or of images without labels.
    """
    first = read_predictions(_file(own[0]))
    if (first["label"] == UNLABELLED).all():
        raise InputError(f"{own[0].name}/{PREDICTIONS} has no labels")
    scores = [_hits(runs, first) for runs in (own, other)]
    probes = [index for index, row in enumerate(own[0].results["domains"]) if row.get("probe", False)]
    counts = ~np.isin(np.unique(first["visit"], return_inverse=True)[1], probes)
    if not counts.any():
        raise InputError(f"{own[0].name}/{PREDICTIONS} has predictions of probes only, which count in no mean")
    difference = (scores[0] - scores[1])[counts]
    return paired_interval(difference, first["visit"][counts], first["sample"][counts])


def _hits(runs: Sequence[Run], first: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """Return for every prediction the fraction of seeds that got it right; of a dense one, of its pixels."""
    total: npt.NDArray[np.float64] = np.zeros(len(first["label"]))
    for run in runs:
        found = read_predictions(_file(run), "position", "label", "prediction")
        if any(not np.array_equal(found[name], first[name]) for name in ("position", "label")):
            raise InputError(f"{run.name}/{PREDICTIONS} has other images than the run that it is compared with")
        right = found["prediction"] == found["label"]
        total += right.reshape(len(right), -1).mean(axis=1)
    return total / len(runs)


def _file(run: Run) -> str:
    return str(run.file.with_name(PREDICTIONS))
