"""Parts of stream orders: shuffled samples, numbered visits, cuts into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ttalight.data.streams.stream import Domain, Labels, Stream, Visit
from ttalight.errors import InputError
from ttalight.seeding import derive_seed

__all__ = [
    "cut_across",
    "cut_within",
    "domains_in_turn",
    "generator",
    "numbered",
    "one_after_the_other",
    "pool",
    "rearranged",
]

Indices = npt.NDArray[np.integer[Any]]


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """Return a generator for one part of a stream, which does not depend on what was drawn for others."""
    return np.random.default_rng(derive_seed(seed, "stream", *key))


def cut_across(size: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Return where the batches of a stretch start, closed by its size; the last batch may be shorter."""
    return cut_within([size], batch_size)


def cut_within(sizes: Sequence[int], batch_size: int) -> npt.NDArray[np.int64]:
    """Return where batches start, closed by the total, if none goes from one stretch into the next.

    Args:
        sizes: Lengths of the stretches.
        batch_size: Samples in a batch; the last of a stretch may have fewer.

    Raises:
        ValueError: If the batch size is less than 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    starts = np.cumsum([0, *sizes])
    cuts = [np.arange(start, stop, batch_size) for start, stop in pairwise(starts.tolist())]
    return np.concatenate([*cuts, starts[-1:]])


def numbered(domains: Sequence[Domain], path: Iterable[int]) -> list[Visit]:
    """Return the visits of a path through the domains, with how often each domain was visited before."""
    seen: Counter[Domain] = Counter()
    visits = []
    for index in path:
        visits.append(Visit(index, seen[domains[index]]))
        seen[domains[index]] += 1
    return visits


def one_after_the_other(
    domains: Sequence[Domain],
    visits: Sequence[Visit],
    samples: Sequence[Indices],
    batch_size: int,
    *,
    announced: bool,
    across: bool = False,
) -> Stream:
    """Return the stream of whole visits, one after the other.

    Args:
        domains: The domains.
        visits: The visits.
        samples: For every visit, its samples in order.
        batch_size: Samples in a batch.
        announced: Whether boundaries are announced.
        across: Whether batches may span two visits.
    """
    sizes = [len(part) for part in samples]
    return Stream(
        domains=domains,
        visits=visits,
        visit=np.repeat(np.arange(len(visits), dtype=np.uint32), sizes),
        sample=np.concatenate([part.astype(np.uint32) for part in samples]),
        offsets=cut_across(sum(sizes), batch_size) if across else cut_within(sizes, batch_size),
        announced=announced,
    )


def domains_in_turn(
    domains: Sequence[Domain],
    labels: Labels,
    path: Iterable[int],
    batch_size: int,
    seed: int,
    *,
    announced: bool,
    shuffle: bool,
) -> Stream:
    """Return the stream that shows all samples of a domain at each visit; every visit has an order of its own.

    Args:
        domains: The domains.
        labels: Their labels.
        path: Indices of the domains in order of the visits.
        batch_size: Samples in a batch.
        seed: Seed of the orders.
        announced: Whether boundaries are announced.
        shuffle: Whether the samples of a visit come in random order.
    """
    visits = numbered(domains, path)
    samples: list[Indices] = []
    for visit in visits:
        size = len(labels[visit.domain])
        key = (visit.domain, visit.number) if visit.number else (visit.domain,)
        samples.append(generator(seed, *key).permutation(size) if shuffle else np.arange(size))
    return one_after_the_other(domains, visits, samples, batch_size, announced=announced)


def pool(labels: Labels) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return domain and sample index of all samples, one domain after the other."""
    sizes = [len(part) for part in labels]
    domain = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    return domain, np.concatenate([np.arange(size, dtype=np.uint32) for size in sizes])


def rearranged(sizes: Indices, order: Indices) -> npt.NDArray[np.int64]:
    """Return the positions that consecutive stretches hold, when the stretches come in another order.

    Args:
        sizes: Length of each stretch, (K,).
        order: A permutation of 0 to K - 1.

    Returns:
        A permutation of 0 to the sum of the lengths.
    """
    starts = np.cumsum(sizes) - sizes
    shift = starts[order] - (np.cumsum(sizes[order]) - sizes[order])
    return np.repeat(shift, sizes[order]) + np.arange(int(sizes.sum()))
