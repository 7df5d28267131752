"""Streams: which sample of which domain arrives when, as data."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from ttalight.seeding import derive_seed

__all__ = ["Domain", "PerDomain", "Stream", "StreamOrder", "StreamSampler", "Visit"]


@dataclass(frozen=True)
class Domain:
    """What the images of a stretch of the stream have in common.

    Args:
        name: For example ``gaussian_noise`` or ``clean``.
        severity: Strength of the corruption from 1 to 5, 0 for none.
    """

    name: str
    severity: int = 0


@dataclass(frozen=True)
class Visit:
    """One stay of the stream in a domain: the unit that results have a row for.

    Args:
        domain: Index of the domain among the stream's domains.
        number: How often the stream has been there before.
        probe: Whether nothing of the stay may remain in the method.
    """

    domain: int
    number: int = 0
    probe: bool = False


class Stream:
    """A deterministic list of (visit, sample) references, already cut into batches.

    A reference costs eight bytes and there is no Python object for any of them.

    Args:
        domains: The domains that the stream draws from.
        visits: The stream's visits in order.
        visit: For every position, the index of its visit; integers, (N,).
        sample: For every position, the index of the sample within its domain's image set; integers, (N,).
        offsets: Position at which each batch starts, closed by N; integers, (number of batches + 1,).
        announced: Whether a method may be told that a new visit begins.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        visits: Sequence[Visit],
        visit: npt.NDArray[Any],
        sample: npt.NDArray[Any],
        offsets: npt.NDArray[Any],
        announced: bool,
    ) -> None:
        self.domains = tuple(domains)
        self.visits = tuple(visits)
        self.visit = visit.astype(np.uint32, copy=False)
        self.sample = sample.astype(np.uint32, copy=False)
        self.offsets = offsets.astype(np.int64, copy=False)
        self.announced = announced
        self._domain_of_visit = np.array([visit.domain for visit in visits], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self.offsets) - 1

    def batch(self, index: int) -> slice:
        """Return the positions of a batch."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def domain_of(self, positions: slice) -> npt.NDArray[np.int64]:
        """Return the domain index of each of the given positions."""
        domain: npt.NDArray[np.int64] = self._domain_of_visit[self.visit[positions]]
        return domain

    def begins_visit(self, index: int) -> bool:
        """Return whether a batch is the first of a visit that the stream announces."""
        if not self.announced:
            return index == 0
        start = int(self.offsets[index])
        return start == 0 or bool(self.visit[start] != self.visit[start - 1])

    def is_probe(self, index: int) -> bool:
        """Return whether a batch is a probe: one of which nothing stays in the method."""
        return self.visits[int(self.visit[int(self.offsets[index])])].probe

    @property
    def hash(self) -> str:
        """SHA-256 of everything above, as 64 hexadecimal digits: equal for equal streams on every machine."""
        digest = hashlib.sha256(repr((self.domains, self.visits, self.announced)).encode())
        for array in (self.visit, self.sample, self.offsets):
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


class StreamSampler(Sampler[slice]):
    """Yields the positions of one batch after the other, for ``DataLoader(..., batch_size=None)``.

    Args:
        stream: The stream to go through.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.batches

    def __iter__(self) -> Iterator[slice]:
        return map(self.stream.batch, range(self.stream.batches))


class StreamOrder(ABC):
    """Builds a stream over any set of domains: the base of ``PerDomain`` and its siblings."""

    announced: ClassVar[bool]

    @abstractmethod
    def build(
        self, domains: Sequence[Domain], labels: Sequence[npt.NDArray[np.int64]], batch_size: int, seed: int
    ) -> Stream:
        """Return the stream.

        Args:
            domains: The domains.
            labels: For every domain, the labels of its samples, (samples in the domain,).
            batch_size: Samples in a batch; the last of a visit may have fewer.
            seed: The stream is a function of this and of the arguments above.
        """


class PerDomain(StreamOrder):
    """One domain after the other; the boundaries are announced and no batch crosses one.

    Args:
        shuffle: Whether the samples of a domain come in random order.
    """

    announced = True

    def __init__(self, shuffle: bool = True) -> None:
        self.shuffle = shuffle

    def build(
        self, domains: Sequence[Domain], labels: Sequence[npt.NDArray[np.int64]], batch_size: int, seed: int
    ) -> Stream:
        """Return the stream; see the base class for the arguments."""
        sizes = [len(domain) for domain in labels]
        orders = [self._order(size, derive_seed(seed, "stream", index)) for index, size in enumerate(sizes)]
        starts = np.cumsum([0, *sizes])
        cuts = [np.arange(start, start + size, batch_size) for start, size in zip(starts[:-1], sizes, strict=True)]
        return Stream(
            domains=domains,
            visits=[Visit(index) for index in range(len(domains))],
            visit=np.repeat(np.arange(len(domains)), sizes),
            sample=np.concatenate(orders),
            offsets=np.concatenate([*cuts, starts[-1:]]),
            announced=self.announced,
        )

    def _order(self, size: int, seed: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng(seed).permutation(size) if self.shuffle else np.arange(size)
