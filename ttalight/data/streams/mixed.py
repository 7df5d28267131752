"""All domains at once."""

from __future__ import annotations

from collections.abc import Sequence

from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import cut_across, generator, numbered, pool

__all__ = ["Mixed", "Potpourri"]


class Mixed(StreamOrder):
    """All samples of all domains in one random order; nothing is announced.

    S. Niu, J. Wu, Y. Zhang, Z. Wen, Y. Chen, P. Zhao and M. Tan, *Towards Stable Test-Time Adaptation in Dynamic Wild
    World*, ICLR 2023, arXiv 2302.12400; R. A. Marsden, M. Döbler and B. Yang, *Universal Test-Time Adaptation through
    Weight Ensembling, Diversity Weighting, and Prior Correction*, WACV 2024, arXiv 2306.00650.
    """

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        domain, sample = pool(labels)
        order = generator(seed, "mixed").permutation(len(sample))
        return Stream(
            domains=domains,
            visits=numbered(domains, range(len(domains))),
            visit=domain[order],
            sample=sample[order],
            offsets=cut_across(len(sample), batch_size),
            announced=False,
        )


class Potpourri(Mixed):
    """Domains of every kind and size in one random order, with or without the clean images; nothing is announced.

    X. Fan, J. Jiang, Z. Chen, F. Huang, X. Chen, Q. Jiang, B. Zhang, X. Tang and Z. Wang, *MoETTA: Test-Time Adaptation
    Under Mixed Distribution Shifts with MoE-LayerNorm*, AAAI 2026, arXiv 2511.13760: the fifteen corruptions of
    ImageNet-C, ImageNet-R, -Sketch and -A, and in potpourri+ the clean validation images. Their number is
    ``weighted_mean``, where ImageNet-C has nine tenths of the weight; results have a row for each domain.

    Args:
        clean: Whether the clean images are among them (potpourri+).
    """

    def __init__(self, clean: bool = False) -> None:
        self.clean = clean

    @property
    def needs_clean(self) -> bool:
        """Whether the clean images are among them."""
        return self.clean
