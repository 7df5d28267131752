"""One domain after the other, told apart."""

from __future__ import annotations

from collections.abc import Sequence

from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import domains_in_turn

__all__ = ["PerDomain"]


class PerDomain(StreamOrder):
    """One domain after the other; the boundaries are announced and no batch crosses one.

    With ``reset: domain`` this is the protocol of D. Wang, E. Shelhamer, S. Liu, B. Olshausen and T. Darrell, *Tent:
    Fully Test-Time Adaptation by Entropy Minimization*, ICLR 2021, arXiv 2006.10726. Public benchmarks show the images
    of every domain in the same order; here each domain has its own.

    Args:
        shuffle: Whether the samples of a domain come in random order.
    """

    def __init__(self, shuffle: bool = True) -> None:
        self.shuffle = shuffle

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        path = range(len(domains))
        return domains_in_turn(domains, labels, path, batch_size, seed, announced=True, shuffle=self.shuffle)
