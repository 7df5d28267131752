"""Accuracy along a stream of any length in a fixed number of points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, TypeVar

from ttalight.errors import InputError

_Number = TypeVar("_Number", int, float)


class CurveValues(TypedDict):
    """Values of a curve, one for each stretch; see :meth:`RunningCurve.values`."""

    images: list[int]
    accuracy: list[float]
    running: list[float]


class RunningCurve:
    """Counts images and hits in stretches that become longer as the stream does.

    Stretches begin as single batches. Whenever there are as many as allowed, neighbours are joined, so that every
    stretch holds about the same number of images and none is ever lost.

    Args:
        points: Largest number of stretches, an even number of at least 2.

    Raises:
        ValueError: If ``points`` is anything else.
    """

    def __init__(self, points: int = 200) -> None:
        if points < 2 or points % 2:
            raise InputError(f"points must be even and at least 2, got {points}")
        self.points = points
        self._stride = 1
        self._images: list[int] = []
        self._hits: list[float] = []
        self._batches = 0

    def add(self, images: int, accuracy: float) -> None:
        """Add a batch.

        Args:
            images: Number of images, at least 1.
            accuracy: Fraction of them that was classified correctly; of a dense prediction, the mean over images.
        """
        if self._batches % self._stride == 0:
            if len(self._images) == self.points:
                self._images, self._hits = _pairs(self._images), _pairs(self._hits)
                self._stride *= 2
            self._images.append(0)
            self._hits.append(0.0)
        self._images[-1] += images
        self._hits[-1] += images * accuracy
        self._batches += 1

    def state_dict(self) -> dict[str, Any]:
        """Return all that the curve has counted, as plain values."""
        state = {"stride": self._stride, "batches": self._batches}
        return {**state, "images": list(self._images), "hits": list(self._hits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict()`` of a curve of as many points returned."""
        self._stride, self._batches = state["stride"], state["batches"]
        self._images, self._hits = list(state["images"]), list(state["hits"])

    def values(self) -> CurveValues:
        """Return the curve.

        Returns:
            ``images``, images seen by the end of each stretch; ``accuracy`` in the stretch; ``running``, accuracy
            from the beginning of the stream to the end of the stretch.
        """
        seen, hits = 0, 0.0
        curve: CurveValues = {"images": [], "accuracy": [], "running": []}
        for images, right in zip(self._images, self._hits, strict=True):
            seen, hits = seen + images, hits + right
            curve["images"].append(seen)
            curve["accuracy"].append(right / images)
            curve["running"].append(hits / seen)
        return curve


def _pairs(values: list[_Number]) -> list[_Number]:
    return [left + right for left, right in zip(values[::2], values[1::2], strict=True)]
