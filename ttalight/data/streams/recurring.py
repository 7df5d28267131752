"""Domains that come back again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import cut_across, generator, numbered
from ttalight.errors import InputError

__all__ = ["Recurring"]


class Recurring(StreamOrder):
    """Many short visits in cycles, each blending into the next; nothing is announced, and batches cross boundaries.

    In a transition the probability of the next domain rises from 0 to 1 in proportion to the samples passed. A domain
    continues at each visit where it had stopped, through its samples in random order and then again in another one, so
    every sample comes equally often. Results have a row for each visit.

    Long streams that come back and change smoothly: O. Press, S. Schneider, M. Kümmerer and M. Bethge, *RDumb: A simple
    approach that questions our progress in continual test-time adaptation*, NeurIPS 2023, arXiv 2306.05401. Their
    benchmark CCC is another set of images: it puts two corruptions at a time on one image, at severities between the
    published ones, and walks through random pairs at a fixed difficulty. This stream takes its shape from it and its
    images from the data module.

    Args:
        cycles: How often all domains are visited.
        length: Samples in a visit; by default all of the domain.
        overlap: Share of a visit that blends with its neighbours, half of it with each, in [0, 1]. With 0 domains
            change at once.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, cycles: int = 20, length: int | None = None, overlap: float = 0.5) -> None:
        if cycles < 1:
            raise InputError(f"cycles must be at least 1, got {cycles}")
        if length is not None and length < 1:
            raise InputError(f"length must be at least 1, got {length}")
        if not 0 <= overlap <= 1:
            raise InputError(f"overlap must lie in [0, 1], got {overlap}")
        self.cycles = cycles
        self.length = length
        self.overlap = overlap

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        visits = numbered(domains, list(range(len(domains))) * self.cycles)
        lengths = [self.length or len(part) for part in labels]
        supplies = [
            _supply(len(part), length * self.cycles, seed, index)
            for index, (part, length) in enumerate(zip(labels, lengths, strict=True))
        ]
        turns = [np.split(supply, self.cycles) for supply in supplies]
        sizes = np.array(lengths * self.cycles)
        visit = np.repeat(np.arange(len(visits), dtype=np.uint32), sizes)
        sample = np.concatenate([turn for cycle in zip(*turns, strict=True) for turn in cycle])
        order = _blended(sizes, self.overlap, generator(seed, "recurring"))
        return Stream(domains, visits, visit[order], sample[order], cut_across(len(order), batch_size), announced=False)


def _supply(size: int, count: int, seed: int, domain: int) -> npt.NDArray[np.uint32]:
    """Return the first ``count`` samples of a domain that is gone through again and again."""
    rounds = range(-(-count // size))
    orders = [generator(seed, "recurring", domain, index).permutation(size) for index in rounds]
    return np.concatenate(orders)[:count].astype(np.uint32)


def _blended(sizes: npt.NDArray[np.int64], overlap: float, draws: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return an order of positions in which each stretch blends into the next."""
    order = np.arange(sizes.sum())
    boundaries = np.cumsum(sizes)[:-1].tolist()
    halves = (overlap * np.minimum(sizes[:-1], sizes[1:]) / 2).astype(np.int64).tolist()
    for boundary, half in zip(boundaries, halves, strict=True):
        # Times with densities 2 (1 - t) and 2 t: at t, a share t belongs to the next stretch.
        times = np.concatenate([1 - np.sqrt(draws.random(half)), np.sqrt(draws.random(half))])
        order[boundary - half : boundary + half] = boundary - half + np.argsort(times)
    return order
