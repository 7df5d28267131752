"""The metrics of many stretches of a stream that may interleave."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttalight.metrics.functional import add_sums, batch_sums
from ttalight.metrics.streaming import ClassificationValues, classification_values


class VisitMetrics:
    """Measures every visit of a stream for itself, and all visits that count together.

    A visit has sums on the device while it lasts, and plain numbers once it is closed: memory grows by a few numbers
    a visit, and not with the samples.

    Args:
        ignore_index: Label of samples that do not count; see ``StreamingClassification``.
    """

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index
        #: The closed visits, in the order in which they were closed.
        self.closed: dict[int, ClassificationValues] = {}
        self._open: dict[int, dict[str, Tensor]] = {}
        self._total: dict[str, Tensor] | None = None
        self._dense = False

    @property
    def opened(self) -> list[int]:
        """The visits that are not closed yet."""
        return list(self._open)

    def update(self, visits: Sequence[int], logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            visits: For every sample, the visit it belongs to; of length B.
            logits: (B, C) or (B, C, *), logits or log-probabilities.
            labels: (B,) or (B, *), class indices.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape is wrong. Labels outside [0, C) are reported by :meth:`close`.
        """
        self._dense = self._dense or logits.ndim > 2
        members = dict.fromkeys(visits)
        where = torch.as_tensor(visits) if len(members) > 1 else None
        for visit in members:
            own = slice(None) if where is None else (where == visit).nonzero().squeeze(1).to(logits.device)
            self._add(visit, logits[own], labels[own])

    def _add(self, visit: int, logits: Tensor, labels: Tensor) -> None:
        sums = batch_sums(logits, labels, ignore_index=self.ignore_index)
        self._open[visit] = add_sums(self._open[visit], sums) if visit in self._open else sums

    def close(self, visit: int, counts: bool = True) -> None:
        """Turn the sums of a visit into numbers; waits for the device.

        Args:
            visit: A visit that has samples and is not closed.
            counts: Whether it belongs to the total.

        Raises:
            ValueError: If a label was outside [0, C).
        """
        sums = self._open.pop(visit)
        self.closed[visit] = classification_values(sums, self._dense, ignore_index=self.ignore_index)
        if counts:
            self._total = sums if self._total is None else add_sums(self._total, sums)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all sums and numbers: tensors and plain values only."""
        return {
            "closed": {visit: dict(values) for visit, values in self.closed.items()},
            "open": {visit: _copied(sums) for visit, sums in self._open.items()},
            "total": None if self._total is None else _copied(self._total),
            "dense": self._dense,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue from what ``state_dict()`` returned, with the sums on a device."""
        self.closed = copy.deepcopy(state["closed"])
        self._open = {visit: _copied(sums, device) for visit, sums in state["open"].items()}
        self._total = None if state["total"] is None else _copied(state["total"], device)
        self._dense = state["dense"]

    def add(self, state: Mapping[str, Any]) -> None:
        """Add the sums of open visits that another process measured, as its ``state_dict()`` returned them."""
        self._dense = self._dense or state["dense"]
        for visit, sums in state["open"].items():
            self._open[visit] = add_sums(self._open[visit], sums) if visit in self._open else _copied(sums)

    def total(self) -> ClassificationValues | None:
        """Return the metrics of all samples of the closed visits that count, None if there are none."""
        if self._total is None:
            return None
        return classification_values(self._total, self._dense, partial=True, ignore_index=self.ignore_index)


def _copied(sums: Mapping[str, Tensor], device: torch.device | str | None = None) -> dict[str, Tensor]:
    return {name: value.detach().clone().to(device) for name, value in sums.items()}
