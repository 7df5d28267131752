"""One domain after the other, without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import domains_in_turn, generator
from ttalight.errors import InputError

__all__ = ["Continual"]


class Continual(StreamOrder):
    """One domain after the other in several rounds; boundaries are not announced, and no batch crosses one.

    The first round with ``order: given`` has exactly the batches of ``PerDomain``, so that the two differ in what a
    method is told and in nothing else.

    Q. Wang, O. Fink, L. Van Gool and D. Dai, *Continual Test-Time Domain Adaptation*, CVPR 2022, arXiv 2203.13591,
    with the fifteen corruptions in their usual order and, as a long horizon, in ten rounds or ten random orders.

    Args:
        rounds: How often all domains are visited.
        order: ``given`` (that of the data module's ``domains``) or ``random``: drawn with the seed, the same in every
            round.
        shuffle: Whether the samples of a visit come in random order.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, rounds: int = 1, order: Literal["given", "random"] = "given", shuffle: bool = True) -> None:
        if rounds < 1:
            raise InputError(f"rounds must be at least 1, got {rounds}")
        if order not in ("given", "random"):
            raise InputError(f"order must be given or random, got {order!r}")
        self.rounds = rounds
        self.order = order
        self.shuffle = shuffle

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        path = list(range(len(domains)))
        if self.order == "random":
            generator(seed, "domains").shuffle(path)
        path *= self.rounds
        return domains_in_turn(domains, labels, path, batch_size, seed, announced=False, shuffle=self.shuffle)
