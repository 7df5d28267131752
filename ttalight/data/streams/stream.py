"""Streams: which sample of which domain arrives when, as data."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DistributedSampler

from ttalight.arguments import CheckedArguments, shown_arguments
from ttalight.data.streams.stream_file import read_stream_file, write_stream_file
from ttalight.errors import InputError

__all__ = ["Domain", "Labels", "Stream", "StreamOrder", "StreamSampler", "Timing", "Visit"]

#: For every domain, the labels of its samples.
Labels = Sequence[npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Domain:
    """Properties of the images in a stretch of the stream.

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
    # Not in the text that is hashed: streams without probes keep the hashes they had before there were any.
    probe: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Timing:
    """When the batches of a stream arrive, and what they cost.

    Args:
        arrivals: Time at which each batch is complete, in seconds, (batches,).
        costs: Seconds that adaptation to each takes, (batches,); None where they are measured.
    """

    arrivals: npt.NDArray[np.float64]
    costs: npt.NDArray[np.float64] | None = None


class Stream:
    """A deterministic list of (visit, sample) references, already cut into batches.

    A reference costs eight bytes, a batch another eight, and there is no Python object for any of them.

    Args:
        domains: The domains that the stream draws from.
        visits: The visits; results list them in this order.
        visit: For every position, the index of its visit; integers, (N,).
        sample: For every position, the index of the sample within its domain's image set; integers, (N,).
        offsets: Position at which each batch starts, closed by N; integers, (number of batches + 1,).
        announced: Whether a method may be told that a new visit begins.
        window: Samples that a batch shows, if that is more than it has of its own: the ones before come again, and
            count no more. Such a window does not reach back over an announced boundary.

    Raises:
        ValueError: If lengths, ranges or order are not as above, a batch is a probe in part only, or a stream with
            probes has a window.
    """

    #: When its batches arrive; None for a stream that waits for the method. No part of the hash, or of files.
    timing: Timing | None = None

    def __init__(
        self,
        domains: Sequence[Domain],
        visits: Sequence[Visit],
        visit: npt.NDArray[Any],
        sample: npt.NDArray[Any],
        offsets: npt.NDArray[Any],
        announced: bool,
        window: int | None = None,
    ) -> None:
        self.domains = tuple(domains)
        self.visits = tuple(visits)
        self.visit = _references(visit, "visit")
        self.sample = _references(sample, "sample")
        self.offsets = _read_only(offsets.astype(np.int64, copy=False))
        self.announced = announced
        self.window = window
        self._domain_of_visit = np.array([visit.domain for visit in visits], dtype=np.int64)
        self._check()
        if any(visit.probe for visit in self.visits):
            self._check_probes()

    def _check(self) -> None:
        if self.visit.shape != self.sample.shape:
            raise InputError(f"visit and sample must be equally long, got {len(self.visit)} and {len(self.sample)}")
        ends = [0, len(self)]
        if self.offsets.ndim != 1 or self.offsets[[0, -1]].tolist() != ends or (np.diff(self.offsets) <= 0).any():
            raise InputError(f"offsets must rise from 0 to the number of samples, {len(self)}, without an empty batch")
        if int(self.visit.max()) >= len(self.visits):
            raise InputError(f"visit has the index {self.visit.max()}, but there are {len(self.visits)} visits")
        if not all(0 <= visit.domain < len(self.domains) for visit in self.visits):
            raise InputError(f"every visit must be to one of the {len(self.domains)} domains, got {self.visits}")
        if self.window is not None and self.window < 1:
            raise InputError(f"window must be at least 1, got {self.window}")

    def _check_probes(self) -> None:
        if self.window is not None:
            raise InputError("a stream with probes has no window: a probe's images would be in the windows after it")
        probe = np.array([visit.probe for visit in self.visits])[self.visit]
        if (np.repeat(probe[self.offsets[:-1]], np.diff(self.offsets)) != probe).any():
            raise InputError("a batch must be a probe as a whole, or not at all")

    def __len__(self) -> int:
        return len(self.sample)

    def __repr__(self) -> str:
        announced = "announced" if self.announced else "not announced"
        window = f", window {self.window}" if self.window is not None else ""
        return (
            f"Stream({len(self):,} samples of {len(self.domains)} domains in {len(self.visits)} visits, {announced}, "
            f"{self.batches:,} batches{window}, hash {self.hash[:8]})"
        )

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self.offsets) - 1

    def batch(self, index: int) -> slice:
        """Return the positions that a batch shows."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        if self.window is None:
            return slice(start, stop)
        first = min(start, max(0, stop - self.window))
        if self.announced:
            others = np.flatnonzero(self.visit[first:start] != self.visit[start])
            first += int(others[-1]) + 1 if len(others) else 0
        return slice(first, stop)

    def scored(self, index: int) -> slice:
        """Return which samples of a batch count, as a slice of the batch: all but those that a window repeats."""
        shown = self.batch(index)
        return slice(int(self.offsets[index]) - shown.start, shown.stop - shown.start)

    def domain_of(self, positions: slice) -> npt.NDArray[np.int64]:
        """Return the domain index of each of the given positions."""
        domain: npt.NDArray[np.int64] = self._domain_of_visit[self.visit[positions]]
        return domain

    def counts(self, batches: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        """Return the number of samples of each visit, (visits,), in all batches or in those of the given numbers."""
        visit = self.visit
        if batches is not None:
            chosen = np.zeros(self.batches, dtype=bool)
            chosen[batches] = True
            visit = visit[np.repeat(chosen, np.diff(self.offsets))]
        return np.bincount(visit, minlength=len(self.visits))

    def begins_visit(self, index: int) -> bool:
        """Return whether a batch is the first of a visit that the stream announces; probes are passed over."""
        if self.is_probe(index):
            return False
        previous = index - 1
        while previous >= 0 and self.is_probe(previous):
            previous -= 1
        if previous < 0 or not self.announced:
            return previous < 0
        return bool(self.visit[self.offsets[index]] != self.visit[self.offsets[previous + 1] - 1])

    def is_probe(self, index: int) -> bool:
        """Return whether a batch is a probe: one of which nothing stays in the method."""
        return self.visits[int(self.visit[int(self.offsets[index])])].probe

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything above, as 64 hexadecimal digits: equal for equal streams on every machine."""
        digest = hashlib.sha256(repr((self.domains, self.visits, self.announced)).encode())
        probes = [index for index, visit in enumerate(self.visits) if visit.probe]
        if probes or self.window is not None:
            digest.update(repr((probes, self.window)).encode())
        for array in (self.visit, self.sample, self.offsets):
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the stream to an .npz file, which has its name only once it is complete.

        Args:
            path: The file; it is replaced.
        """
        header = {
            "domains": [[domain.name, domain.severity] for domain in self.domains],
            "visits": [[visit.domain, visit.number, visit.probe] for visit in self.visits],
            "announced": self.announced,
            "window": self.window,
            "hash": self.hash,
        }
        write_stream_file(Path(path), header, {name: getattr(self, name) for name in ("visit", "sample", "offsets")})

    @classmethod
    def load(cls, path: str | Path) -> Stream:
        """Read a stream that ``save`` wrote; nothing in the file is ever unpickled.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, was changed, or is of another kind.
        """
        header, arrays = read_stream_file(Path(path))
        try:
            domains = [Domain(str(name), int(severity)) for name, severity in header["domains"]]
            visits = [Visit(int(domain), int(number), bool(probe)) for domain, number, probe in header["visits"]]
            window = header["window"]
            if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
                raise InputError(f"its window is {window!r:.60}")
            stream = cls(domains, visits, **arrays, announced=bool(header["announced"]), window=window)
            if stream.hash != header["hash"]:
                raise InputError("its content does not fit the hash in it")
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise InputError(f"{path} is damaged or was changed ({error}): write it again") from error
        return stream


def _references(indices: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint32]:
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
        raise InputError(f"{name} must be integers (N,), N at least 1, got {indices.dtype} of shape {indices.shape}")
    if indices.dtype != np.uint32 and (int(indices.min()) < 0 or int(indices.max()) >= 2**32):
        raise InputError(f"{name} must lie in [0, 2^32), got {indices.min()} to {indices.max()}")
    return _read_only(indices.astype(np.uint32, copy=False))


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view: npt.NDArray[Any] = array.view()
    view.flags.writeable = False
    return view


class StreamSampler(DistributedSampler[slice]):
    """Yields the positions of one batch after the other, for ``DataLoader(..., batch_size=None)``.

    Its length is that of the whole stream whatever it yields of it, so that limits and progress count from the
    beginning. It is a ``DistributedSampler`` because Lightning leaves these alone: another one would be replaced where
    several processes run, and its batches divided without regard to what belongs together.

    Args:
        stream: The stream to go through.
        start: The batch to start with.
        chosen: Numbers of the batches to go through, rising; by default all.

    Raises:
        ValueError: If the stream has no such batch.
    """

    def __init__(self, stream: Stream, start: int = 0, chosen: npt.NDArray[np.int64] | None = None) -> None:
        if not 0 <= start < stream.batches:
            raise InputError(f"start must be one of the stream's batches, 0 to {stream.batches - 1}, got {start}")
        super().__init__(stream, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self.stream = stream
        every = np.arange(stream.batches) if chosen is None else chosen
        #: Numbers of the batches that are yielded, (K,).
        self.numbers = every[every >= start]

    def __len__(self) -> int:
        return self.stream.batches

    def __iter__(self) -> Iterator[slice]:
        return map(self.stream.batch, self.numbers.tolist())


class StreamOrder(CheckedArguments, ABC):
    """Builds a stream over any set of domains: the base of ``PerDomain`` and its siblings.

    Arguments of subclasses are plain and are kept under their own names, so that ``describe`` can tell them.
    """

    @abstractmethod
    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream.

        Args:
            domains: The domains; where ``needs_clean`` is true, the last one is that of the clean images.
            labels: For every domain, the labels of its samples, (samples in the domain,). They may shape the stream;
                a method sees none of them.
            batch_size: Samples in a batch; the last of a visit may have fewer.
            seed: The stream is a function of this and of the arguments above.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_arguments(self, self.given_arguments)})"

    @property
    def needs_clean(self) -> bool:
        """Whether the clean images are wanted as one more domain, after those that were asked for."""
        return False

    def severities(self, severity: int) -> Sequence[int]:
        """Return the severities at which each corruption is wanted.

        Args:
            severity: The one that was asked for.
        """
        return (severity,)

    def describe(self) -> dict[str, Any]:
        """Return the arguments that this was made with, as plain values; an order within has its ``class`` too."""
        names = inspect.signature(type(self)).parameters
        return {name: _plain(getattr(self, name)) for name in names if hasattr(self, name)}


def _plain(value: Any) -> Any:
    if isinstance(value, StreamOrder):
        return {"class": type(value).__name__, **value.describe()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
