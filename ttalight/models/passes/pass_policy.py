"""Ways to compute a network's passes that give the same numbers in less time or memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttalight.models.network import Network

__all__ = ["PassPolicy"]


class PassPolicy(ABC):
    """A way to compute a network's passes: ``FastPass`` or ``RecomputedBlocks``, in the one argument ``passes``."""

    @abstractmethod
    def attach(self, net: Network) -> None:
        """Begin to compute the passes of a network.

        Args:
            net: The network; its weights are not changed.

        Raises:
            ValueError: If this cannot be done for the network.
        """

    @abstractmethod
    def detach(self) -> None:
        """Restore the network's own passes."""

    def describe(self) -> str:
        """Return the name, and those arguments that are not the default, for results."""
        return type(self).__name__

    def capture(self) -> dict[str, list[str]]:
        """Return way and reason of each kind of pass, by its description, where there is a choice."""
        return {}

    def restore(self, record: Mapping[str, Sequence[str]]) -> None:  # noqa: B027
        """Compute passes in the ways that ``capture`` returned."""
