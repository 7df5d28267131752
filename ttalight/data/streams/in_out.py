"""Clean images among those of each domain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import cut_within, generator, numbered
from ttalight.errors import InputError

__all__ = ["InOut"]


class InOut(StreamOrder):
    """One domain after the other, a share of each replaced by clean images; nothing is announced.

    The samples of a domain and the clean ones among them come in random order, and have a row each. No batch crosses
    from one domain to the next.

    The in-out mixture of H. Zhao, Y. Liu, A. Alahi and T. Lin, *On Pitfalls of Test-Time Adaptation*, ICML 2023, arXiv
    2306.03536. The authors' ratio is the fraction that is kept of both sets; at 0.5 the two definitions agree.

    Args:
        share: Share of clean images, in (0, 1).

    Raises:
        ValueError: If the share is out of range.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share < 1:
            raise InputError(f"share must lie in (0, 1), got {share}")
        self.share = share

    @property
    def needs_clean(self) -> bool:
        """The clean images are needed."""
        return True

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments.

        Raises:
            ValueError: If there are too few clean images.
        """
        targets, clean = range(len(domains) - 1), len(domains) - 1
        visit, sample = [], []
        for index in targets:
            size, draws = len(labels[index]), generator(seed, "in-out", index)
            replaced = round(self.share * size)
            if replaced > len(labels[clean]):
                raise InputError(
                    f"share {self.share:g} of the {size} samples of {domains[index].name} is {replaced}, and there are "
                    f"{len(labels[clean])} clean images"
                )
            order = draws.permutation(size)
            which = np.concatenate([np.zeros(size - replaced, int), np.ones(replaced, int)])[order]
            chosen = [draws.permutation(size)[: size - replaced], draws.permutation(len(labels[clean]))[:replaced]]
            visit.append(2 * index + which)
            sample.append(np.concatenate(chosen)[order])
        return Stream(
            domains=domains,
            visits=numbered(domains, (domain for index in targets for domain in (index, clean))),
            visit=np.concatenate(visit),
            sample=np.concatenate(sample),
            offsets=cut_within([len(part) for part in sample], batch_size),
            announced=False,
        )
