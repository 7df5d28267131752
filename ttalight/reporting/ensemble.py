"""The saved predictions of several runs on one stream as those of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ttalight.errors import InputError
from ttalight.reporting.predictions import read_predictions

__all__ = ["ensemble_predictions"]

_SAME = ("position", "visit", "domain", "sample", "label", "domains")


def ensemble_predictions(
    runs: Sequence[str | Path], merge: Literal["probabilities", "logits"] = "probabilities"
) -> dict[str, npt.NDArray[Any]]:
    """Merge the predictions of runs that saw the same images in the same order; see ``AdaptedEnsemble``.

    Args:
        runs: ``predictions.npz`` of each run, or its folder.
        merge: ``probabilities`` for the logarithm of the mean of class probabilities, ``logits`` for the mean of
            logits.

    Returns:
        Name -> array, with the names of ``predictions.npz``. ``logits`` is the merged prediction, (N, C, *) in float32,
        and ``prediction`` its most likely class.

    Raises:
        FileNotFoundError: If a run has no predictions.
        ValueError: If there are no runs, a file is damaged, or they are of several streams or numbers of classes.
    """
    if merge not in ("probabilities", "logits"):
        raise InputError(f"merge must be 'probabilities' or 'logits', got {merge!r}")
    if isinstance(runs, (str, Path)) or not len(runs):
        raise InputError(f"runs must be a list of at least one folder of a run, got {runs!r:.60}")
    columns = read_predictions(runs[0], *_SAME)
    total: Any = None
    for run in runs:
        own = read_predictions(run, *_SAME, "logits")
        logits = own["logits"].astype(np.float32)
        differing = [name for name in _SAME if not np.array_equal(own[name], columns[name])]
        if differing or (total is not None and logits.shape != total.shape):
            what = ", ".join(differing) or "classes"
            raise InputError(f"the runs {runs[0]} and {run} are not of one stream: they differ in {what}")
        if merge == "probabilities":
            logits = _log_probabilities(logits)
            total = logits if total is None else np.logaddexp(total, logits)
        else:
            total = logits if total is None else total + logits
    merged = total - np.float32(np.log(len(runs))) if merge == "probabilities" else total / np.float32(len(runs))
    return columns | {"prediction": merged.argmax(1), "logits": merged}


def _log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    made: npt.NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return made
