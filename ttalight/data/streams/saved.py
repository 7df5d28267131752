"""A stream from a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.errors import InputError

__all__ = ["SavedStream"]


class SavedStream(StreamOrder):
    """A stream as it was saved, batch for batch: by a run, or by a program of one's own (``Stream.save``).

    The data module must deliver the domains of the file, in the same order; batch size, seed and the severity of the
    data module do not change the stream.

    Args:
        path: The .npz file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @cached_property
    def _stream(self) -> Stream:
        return Stream.load(self.path)

    @property
    def needs_clean(self) -> bool:
        """Whether the last domain of the file is that of the clean images."""
        return self._stream.domains[-1] == Domain("clean")

    def severities(self, severity: int) -> Sequence[int]:
        """Return those of the file, in order."""
        found = dict.fromkeys(domain.severity for domain in self._stream.domains if domain.severity)
        return tuple(found) or (severity,)

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream.

        Args:
            domains: What the data module delivers.
            labels: Their labels; only their number matters.
            batch_size: Not used.
            seed: Not used.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or needs other domains.
        """
        wanted = self._stream.domains
        if tuple(domains[: len(wanted)]) != wanted:
            raise InputError(
                f"{self.path} is a stream over {_names(wanted)}, and the data module delivers {_names(domains)}: give "
                "the same domains in the same order"
            )
        return self._stream


def _names(domains: Sequence[Domain]) -> str:
    return ", ".join(f"{domain.name} ({domain.severity})" if domain.severity else domain.name for domain in domains)
