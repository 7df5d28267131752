"""A fixed order of labelled samples that spreads the classes evenly."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ttalight.errors import InputError

__all__ = ["held_out", "spread_order"]

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


def held_out(labels: npt.ArrayLike, count: int, split: Literal["train", "validation"]) -> npt.NDArray[np.int64]:
    """Return which training samples a split has, where some are held out for validation.

    Args:
        labels: Class of each training sample, integers (N,).
        count: Samples that are held out: the last of the order that spreads the classes.
        split: The samples that are trained on, or those held out.

    Returns:
        Indices, in rising order.

    Raises:
        ValueError: If nothing is left to train on, or nothing is held out and that is asked for.
    """
    order = spread_order(labels)
    if count >= len(order):
        raise InputError(f"validation must be less than the {len(order)} training images, got {count}")
    if split == "validation" and count == 0:
        raise InputError("there are no validation images: validation is 0, so all training images are trained on")
    cut = len(order) - count
    return np.sort(order[:cut] if split == "train" else order[cut:])
