"""A fixed order of labelled samples that spreads the classes evenly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["spread_order"]

_SEED = 20250707  # part of every split that was ever made with it


def spread_order(labels: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return a random order, always the same, in which any stretch has about the classes' shares of the whole.

    Args:
        labels: Class of each sample, integers (N,).

    Returns:
        A permutation of 0 to N - 1. In its first or last n entries the number of samples of a class with share p
        differs from n p by less than two.
    """
    classes = np.asarray(labels)
    keys = np.random.default_rng(_SEED).random(len(classes))
    place = np.empty(len(classes))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        place[members[np.argsort(keys[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((keys, place))
