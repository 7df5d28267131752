"""The base of the streams that change another one."""

from __future__ import annotations

from collections.abc import Sequence

from ttalight.data.streams.per_domain import PerDomain
from ttalight.data.streams.stream import StreamOrder

__all__ = ["OrderAround"]


class OrderAround(StreamOrder):
    """Base of the streams that change another one.

    Args:
        stream: The other stream; ``PerDomain()`` by default.
    """

    def __init__(self, stream: StreamOrder | None = None) -> None:
        self.stream = stream if stream is not None else PerDomain()

    @property
    def needs_clean(self) -> bool:
        """As the other stream's."""
        return self.stream.needs_clean

    def severities(self, severity: int) -> Sequence[int]:
        """Return those of the other stream."""
        return self.stream.severities(severity)
