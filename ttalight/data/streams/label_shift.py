"""A label distribution that changes within each domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ttalight.data.streams.class_order import group_by_class
from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import generator, numbered, one_after_the_other
from ttalight.errors import InputError

__all__ = ["LabelShift"]


class LabelShift(StreamOrder):
    """Domain by domain, and in each one class after the other is more frequent than the rest; boundaries are announced.

    In the phase of class k a sample is of class k with probability r / (r + C - 1) and of any other class with
    probability 1 / (r + C - 1), where r is ``ratio``. The C phases are equally long, in a random order of classes.
    Samples are drawn from their class with replacement.

    S. Niu, J. Wu, Y. Zhang, Z. Wen, Y. Chen, P. Zhao and M. Tan, *Towards Stable Test-Time Adaptation in Dynamic Wild
    World*, ICLR 2023, arXiv 2302.12400. The authors use one list of draws, 100,000 from 50,000 images, for all
    corruptions; here each domain has its own.

    Args:
        ratio: The authors' imbalance ratio, 1 (no imbalance), 1000 to 5000, or 500000 (classes practically sorted).
        samples: Draws in a domain; by default as many as it has samples.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, ratio: float = 500_000, samples: int | None = None) -> None:
        if not 1 <= ratio < float("inf"):
            raise InputError(f"ratio must be at least 1 and finite, got {ratio}")
        if samples is not None and samples < 1:
            raise InputError(f"samples must be at least 1, got {samples}")
        self.ratio = ratio
        self.samples = samples

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        drawn = [
            shifting_draws(part, self.ratio, self.samples or len(part), generator(seed, "label-shift", index))
            for index, part in enumerate(labels)
        ]
        visits = numbered(domains, range(len(domains)))
        return one_after_the_other(domains, visits, drawn, batch_size, announced=True)


def shifting_draws(
    labels: npt.NDArray[Any], ratio: float, count: int, draws: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw samples with replacement while the frequent class changes.

    Args:
        labels: Class of each sample, (N,).
        ratio: How many times as frequent the class of a phase is as each other one.
        count: Number of draws T; phase k of C holds those from T k / C on, rounded down.
        draws: Source of randomness.

    Returns:
        Indices of samples, (T,).
    """
    grouped, sizes = group_by_class(labels, draws)
    classes = len(sizes)
    phase = np.repeat(draws.permutation(classes), np.diff(np.arange(classes + 1) * count // classes))
    # Another class is the phase's plus 1 to C - 1, each equally likely.
    strays = draws.random(count) >= ratio / (ratio + classes - 1)
    chosen = (phase + strays * draws.integers(1, max(2, classes), count)) % classes
    starts = np.cumsum(sizes) - sizes
    drawn: npt.NDArray[np.int64] = grouped[starts[chosen] + (draws.random(count) * sizes[chosen]).astype(np.int64)]
    return drawn
