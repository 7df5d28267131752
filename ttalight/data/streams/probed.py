"""Clean images at intervals, which measure forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ttalight.data.streams.order_around import OrderAround
from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder, Visit
from ttalight.data.streams.stretches import cut_across, generator
from ttalight.errors import InputError

__all__ = ["Probed"]


class Probed(OrderAround):
    """Another stream with clean images at intervals, of which nothing stays in the method; announced as that stream is.

    A probe is a visit to the clean domain with a row of its own. The method meets its batches as any others, and goes
    on afterwards from the state it had before: the rest of the stream gives the same predictions as without probes. A
    probe shows the same clean images every time.

    S. Niu, J. Wu, Y. Zhang, Y. Chen, S. Zheng, P. Zhao and M. Tan, *Efficient Test-Time Model Adaptation without
    Forgetting*, ICML 2022, arXiv 2204.02610: clean accuracy after each corruption. The authors continue from the state
    that adapted to the clean images.

    Args:
        stream: The other stream; ``PerDomain()`` by default.
        every: Samples between probes: one follows the batch that completes another so many, and one stands at the end.
            By default a probe stands at the end of each visit.
        samples: Clean images in a probe, drawn once; by default all.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, stream: StreamOrder | None = None, every: int | None = None, samples: int | None = None) -> None:
        if every is not None and every < 1:
            raise InputError(f"every must be at least 1, got {every}")
        if samples is not None and samples < 1:
            raise InputError(f"samples must be at least 1, got {samples}")
        super().__init__(stream)
        self.every = every
        self.samples = samples

    @property
    def needs_clean(self) -> bool:
        """The clean images are needed."""
        return True

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments.

        Raises:
            ValueError: If the other stream has a window, or mixes its visits and ``every`` is not given.
        """
        known = len(domains) if self.stream.needs_clean else len(domains) - 1
        other = self.stream.build(domains[:known], labels[:known], batch_size, seed)
        if other.window is not None:
            raise InputError("a stream with a window takes no probes: their images would be in the windows after them")
        clean = len(domains) - 1
        probe = generator(seed, "probe").permutation(len(labels[clean]))[: self.samples].astype(np.uint32)
        places = self._places(other)
        before = sum(domains[visit.domain] == domains[clean] for visit in other.visits)
        first = len(other.visits)
        visits = [*other.visits, *(Visit(clean, before + index, probe=True) for index in range(len(places)))]
        visit = [np.full(len(probe), first + index, dtype=np.uint32) for index in range(len(places))]
        cuts = np.split(other.offsets[:-1], np.searchsorted(other.offsets, places))
        lengths = len(probe) * np.arange(len(places) + 1)
        probe_cuts = cut_across(len(probe), batch_size)[:-1]
        starts = [place + length + probe_cuts for place, length in zip(places, lengths[:-1], strict=True)]
        own = [cut + length for cut, length in zip(cuts, lengths, strict=True)]
        return Stream(
            domains=domains,
            visits=visits,
            visit=_interleaved(np.split(other.visit, places), visit),
            sample=_interleaved(np.split(other.sample, places), [probe] * len(places)),
            offsets=np.append(_interleaved(own, starts), len(other) + len(probe) * len(places)),
            announced=other.announced,
        )

    def _places(self, other: Stream) -> npt.NDArray[np.int64]:
        """Return the positions at which a probe is put in: starts of batches, or the end."""
        if self.every is not None:
            wanted = np.append(np.arange(self.every, len(other), self.every), len(other))
        else:
            wanted = np.append(np.flatnonzero(np.diff(other.visit)) + 1, len(other))
            if len(wanted) > len(other.visits):
                raise InputError(
                    "this stream mixes its visits, so that they have no ends to put probes at: give every, the number "
                    "of samples between probes"
                )
        return np.unique(other.offsets[np.searchsorted(other.offsets, wanted)])


def _interleaved(
    parts: Sequence[npt.NDArray[np.integer]], between: Sequence[npt.NDArray[np.integer]]
) -> npt.NDArray[np.integer]:
    """Join parts, with one of the others between each two of them and the next."""
    joined = [array for pair in zip(parts, between, strict=False) for array in pair]
    return np.concatenate([*joined, *parts[len(between) :]])
