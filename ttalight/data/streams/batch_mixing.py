"""Batches of one domain and batches of all, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ttalight.data.streams.mixed import Mixed
from ttalight.data.streams.per_domain import PerDomain
from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import generator, numbered, rearranged
from ttalight.errors import InputError

__all__ = ["BatchMixing"]


class BatchMixing(StreamOrder):
    """Whole batches of ``PerDomain`` alternate with whole batches of ``Mixed``; nothing is announced.

    Every sample comes twice, once in each kind of batch. Visit 0 of a domain is its own batches, visit 1 its part in
    the mixed ones, so that results tell the two apart.

    From the published code of C. Ye, D. Wei and others, DATTA (repository DYW77/DATTA), which drops the last, shorter
    batches; here they are kept. Which batches there are depends on the batch size.

    Args:
        order: ``interval`` (the domains in order), ``interval_shuffled`` (the batches of one domain in random order) or
            ``shuffled`` (all batches in random order, not in turn).

    Raises:
        ValueError: If the order is none of these.
    """

    def __init__(self, order: Literal["interval", "interval_shuffled", "shuffled"] = "interval") -> None:
        if order not in ("interval", "interval_shuffled", "shuffled"):
            raise InputError(f"order must be interval, interval_shuffled or shuffled, got {order!r}")
        self.order = order

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        alone = PerDomain().build(domains, labels, batch_size, seed)
        mixed = Mixed().build(domains, labels, batch_size, seed)
        sizes = np.concatenate([np.diff(alone.offsets), np.diff(mixed.offsets)])
        order = self._batch_order(alone.batches, mixed.batches, generator(seed, "batch-mixing"))
        positions = rearranged(sizes, order)
        return Stream(
            domains=domains,
            visits=numbered(domains, [*range(len(domains)), *range(len(domains))]),
            visit=np.concatenate([alone.visit, mixed.visit + np.uint32(len(domains))])[positions],
            sample=np.concatenate([alone.sample, mixed.sample])[positions],
            offsets=np.concatenate([[0], np.cumsum(sizes[order])]),
            announced=False,
        )

    def _batch_order(self, alone: int, mixed: int, draws: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the order of the batches, numbered with those of one domain first."""
        if self.order == "shuffled":
            return draws.permutation(alone + mixed)
        first = draws.permutation(alone) if self.order == "interval_shuffled" else np.arange(alone)
        # Those of one domain are ragged and so may be more: the surplus comes at the end.
        place = np.concatenate([2 * np.arange(alone), 2 * np.arange(mixed) + 1])
        return np.concatenate([first, alone + np.arange(mixed)])[np.argsort(place)]
