"""The batches of a stream that each process gets, where each domain or batch starts from the source."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ttalight.data.streams.stream import Stream
from ttalight.errors import InputError

__all__ = ["BatchPositions", "StreamShare", "batch_positions", "partition"]

Numbers = npt.NDArray[np.int64]


class BatchPositions(NamedTuple):
    """The position of each batch in one process that goes through the whole stream.

    Args:
        visit: Number of the announced visit, from 0, -1 before the first; (batches,).
        batch: Number of the batch in that visit, as an adapter counts it: after a probe it is what it was before;
            (batches,).
    """

    visit: Numbers
    batch: Numbers


def batch_positions(stream: Stream) -> BatchPositions:
    """Return the position of each batch of a stream."""
    visits, batches = np.empty((2, stream.batches), dtype=np.int64)
    visit, batch, probed = -1, 0, 0
    for index in range(stream.batches):
        probe = stream.is_probe(index)
        if not probe and stream.begins_visit(index):
            visit, batch = visit + 1, 0
        probed = probed + 1 if probe else 0
        visits[index], batches[index] = visit, batch + max(0, probed - 1)
        batch += not probe
    return BatchPositions(visits, batches)


def partition(stream: Stream, ranks: int, each_batch: bool = False) -> list[Numbers]:
    """Partition a stream over processes in parts that depend on nothing before them.

    A part is an announced visit, which goes to the process with the fewest images so far, the largest first. Where
    every batch starts from the source, a part is a batch, and each process gets consecutive ones. A probe stays with
    the batches before it, whose state it measures.

    Args:
        stream: The stream.
        ranks: Number of processes.
        each_batch: Whether every batch starts from the source.

    Returns:
        For each process, the numbers of its batches, rising; none where there are more processes than parts.

    Raises:
        ValueError: If the stream announces no boundaries and not every batch starts from the source.
    """
    if not (stream.announced or each_batch):
        raise InputError(
            "shard='domain' deals out domains that start from the source each, but this stream does not announce where "
            "one begins: use PerDomain, or another stream that does; reset='batch'; or shard='batch'"
        )
    starts = np.array([0, *(index for index in range(1, stream.batches) if _starts(stream, index, each_batch))])
    ends = np.append(starts[1:], stream.batches)
    images = stream.offsets[ends] - stream.offsets[starts]
    owner = _stretches(images, ranks) if each_batch else _balanced(images, ranks)
    of_batch = np.repeat(owner, ends - starts)
    return [np.flatnonzero(of_batch == rank) for rank in range(ranks)]


class StreamShare:
    """One process's part of a stream, and where each of its batches stands in the whole.

    Args:
        stream: The stream.
        rank: This process.
        ranks: Number of processes.
        each_batch: Whether the method starts every batch from the source.

    Raises:
        ValueError: If the stream announces no boundaries, and domains are to be divided.
    """

    def __init__(self, stream: Stream, rank: int, ranks: int, each_batch: bool) -> None:
        #: Numbers of the batches.
        self.numbers = partition(stream, ranks, each_batch)[rank]
        self._positions = batch_positions(stream)
        self._last = -1

    @property
    def begins_later(self) -> bool:
        """Whether the first batch of the stream is not in this part."""
        return len(self.numbers) > 0 and int(self.numbers[0]) > 0

    def place(self, index: int) -> tuple[int, int] | None:
        """Return visit and number of a batch in the whole stream if the batch before it is in another part."""
        follows, self._last = index == self._last + 1, index
        return None if follows else (int(self._positions.visit[index]), int(self._positions.batch[index]))


def _starts(stream: Stream, index: int, each_batch: bool) -> bool:
    return not stream.is_probe(index) if each_batch else stream.begins_visit(index)


def _balanced(sizes: Numbers, ranks: int) -> Numbers:
    """Return the owner of each part: the largest part first, to the process with the fewest images."""
    owner, load = np.empty(len(sizes), dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    for part in np.argsort(-sizes, kind="stable").tolist():
        rank = int(load.argmin())
        owner[part] = rank
        load[rank] += sizes[part]
    return owner


def _stretches(sizes: Numbers, ranks: int) -> Numbers:
    """Return the owner of each part: consecutive parts, in stretches of about the same size."""
    middle = np.cumsum(sizes) - sizes / 2
    owner: Numbers = np.minimum(middle * ranks // sizes.sum(), ranks - 1).astype(np.int64)
    return owner
