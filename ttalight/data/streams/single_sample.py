"""One sample a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttalight.data.streams.order_around import OrderAround
from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.errors import InputError

__all__ = ["SingleSample"]


class SingleSample(OrderAround):
    """The samples of another stream, one a batch, alone or with those before them; announced as the other stream is.

    S. Niu, J. Wu, Y. Zhang, Z. Wen, Y. Chen, P. Zhao and M. Tan, *Towards Stable Test-Time Adaptation in Dynamic Wild
    World*, ICLR 2023, arXiv 2302.12400 (batch size 1). The window follows the code of R. A. Marsden, M. Döbler and B.
    Yang, *Universal Test-Time Adaptation through Weight Ensembling, Diversity Weighting, and Prior Correction*, WACV
    2024, arXiv 2306.00650, in what a method sees. How often it updates is the method's: their code updates once the
    window has turned over, a method here at every batch.

    Args:
        stream: The other stream; ``PerDomain()`` by default.
        window: Each batch shows the last so many samples, of which only the newest counts. Less while the stream, or a
            visit that it announced, is younger than that.

    Raises:
        ValueError: If the window is less than 1.
    """

    def __init__(self, stream: StreamOrder | None = None, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise InputError(f"window must be at least 1, got {window}")
        super().__init__(stream)
        self.window = window

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        other = self.stream.build(domains, labels, batch_size, seed)
        return Stream(
            domains=other.domains,
            visits=other.visits,
            visit=other.visit,
            sample=other.sample,
            offsets=np.arange(len(other) + 1),
            announced=other.announced,
            window=self.window,
        )
