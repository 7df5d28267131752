"""A stream whose images arrive at a rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttalight.data.streams.order_around import OrderAround
from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder, Timing
from ttalight.errors import InputError

__all__ = ["Clocked"]


class Clocked(OrderAround):
    """Another stream whose images arrive at a constant rate; a method that is too slow misses batches.

    A batch arrives when its last image does. If the method is still busy with an earlier one, the batch is predicted by
    the model as it was last adapted, and is not adapted to. How long the method is busy is measured, or given: then the
    result is the same on every machine. In a probe no time passes.

    M. Alfarra, H. Itani, A. Pardo, S. Alhuwaider, M. Ramazanova, J. C. Pérez, Z. Cai, M. Müller and B. Ghanem,
    *Evaluation of Test-Time Adaptation Under Computational Time Constraints*, ICML 2024, arXiv 2304.04795. Their
    relative cost C(g) is ``cost``, rounded up: the method adapts to one of C(g) batches. The first batch of a stream is
    always adapted to.

    Args:
        rate: Images that arrive in a second.
        stream: The other stream; ``PerDomain()`` by default.
        cost: Time that a batch takes, adaptation and prediction, over the time in which its images arrive. With it the
            rate does not matter.
        milliseconds: Time that a batch of ``batch_size`` images takes; a shorter one takes its share.

    Raises:
        ValueError: If an argument is not positive, both costs are given, or neither a rate nor ``cost``.
    """

    def __init__(
        self,
        rate: float | None = None,
        stream: StreamOrder | None = None,
        cost: float | None = None,
        milliseconds: float | None = None,
    ) -> None:
        for name, value in (("rate", rate), ("cost", cost), ("milliseconds", milliseconds)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} must be positive and finite, got {value}")
        if cost is not None and milliseconds is not None:
            raise InputError(
                "give cost (a ratio) or milliseconds (of a batch), not both; without either it is measured"
            )
        if rate is None and cost is None:
            raise InputError("a clock needs a rate, in images a second, or a cost, as a ratio that needs none")
        self.rate, self.cost, self.milliseconds = rate, cost, milliseconds
        super().__init__(stream)

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        stream = self.stream.build(domains, labels, batch_size, seed)
        rate = self.rate if self.rate is not None else 1.0
        probe = np.array([visit.probe for visit in stream.visits])[stream.visit[stream.offsets[:-1]]]
        sizes = np.diff(stream.offsets)
        each = self.milliseconds / 1000 / batch_size if self.milliseconds is not None else None
        each = self.cost / rate if self.cost is not None else each
        stream.timing = Timing(np.cumsum(np.where(probe, 0, sizes)) / rate, None if each is None else each * sizes)
        return stream
