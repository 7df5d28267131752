"""Streams whose classes are correlated in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ttalight.data.streams.class_order import check_dirichlet, correlated_order
from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import cut_across, generator, numbered, one_after_the_other, pool
from ttalight.errors import InputError

__all__ = ["Correlated", "PracticalTTA"]

#: RoTTA's order of the domains.
_PUBLISHED_ORDER = (
    "motion_blur", "snow", "fog", "shot_noise", "defocus_blur", "contrast", "zoom_blur", "brightness", "frost",
    "elastic_transform", "glass_blur", "gaussian_noise", "pixelate", "jpeg_compression", "impulse_noise",
)  # fmt: skip


class Correlated(StreamOrder):
    """Samples of a class come together, in one domain after the other or in all of them at once; nothing is announced.

    The samples of a class are spread over ``slots`` in proportions from a Dirichlet distribution, and within a slot
    they stand class by class, in an order of classes drawn for each. No batch crosses from one domain to the next,
    unless they are ``mixed``.

    T. Gong, J. Jeong, T. Kim, Y. Kim, J. Shin and S.-J. Lee, *NOTE: Robust Continual Test-time Adaptation Against
    Temporal Correlation*, NeurIPS 2022, arXiv 2208.05117; sorted by class, and mixed: R. A. Marsden, M. Döbler and B.
    Yang, *Universal Test-Time Adaptation through Weight Ensembling, Diversity Weighting, and Prior Correction*, WACV
    2024, arXiv 2306.00650. Public code draws again until no slot is nearly empty; that changes the distribution and
    may never end, so here an empty slot stays empty. It also shows sorted classes in ascending order, and here their
    order is random.

    Args:
        gamma: Concentration of the Dirichlet distribution; the smaller, the longer the runs of a class. ``null`` sorts
            by class.
        slots: Number of slots; by default as many as there are classes, 100 at most.
        mixed: Whether the samples of a class and slot come from all domains, in random order.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, gamma: float | None = 0.1, slots: int | None = None, mixed: bool = False) -> None:
        check_dirichlet(gamma, slots)
        self.gamma = gamma
        self.slots = slots
        self.mixed = mixed

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        visits = numbered(domains, range(len(domains)))
        if not self.mixed:
            samples = [
                correlated_order(part, self.gamma, self.slots, generator(seed, "correlated", index))
                for index, part in enumerate(labels)
            ]
            return one_after_the_other(domains, visits, samples, batch_size, announced=False)
        domain, sample = pool(labels)
        order = correlated_order(np.concatenate(labels), self.gamma, self.slots, generator(seed, "correlated"))
        return Stream(domains, visits, domain[order], sample[order], cut_across(len(order), batch_size), False)


class PracticalTTA(StreamOrder):
    """Domains that change while classes are correlated: one unbroken stream, whose batches cross the boundaries.

    L. Yuan, B. Xie and S. Li, *Robust Test-Time Adaptation in Dynamic Scenarios*, CVPR 2023, arXiv 2303.13899. The
    authors keep the samples of a class and slot in the order of the data set; here it is random.

    Args:
        gamma: Concentration of the Dirichlet distribution; see ``Correlated``.
        slots: Number of slots in a domain; by default as many as there are classes, 100 at most.
        order: Order of the domains: ``published`` (motion blur first, domains that the authors have not after theirs)
            or ``given`` (that of the data module's ``domains``).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, gamma: float = 0.1, slots: int | None = None, order: Literal["published", "given"] = "published"
    ) -> None:
        check_dirichlet(gamma, slots)
        if order not in ("published", "given"):
            raise InputError(f"order must be published or given, got {order!r}")
        self.gamma = gamma
        self.slots = slots
        self.order = order

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments."""
        path = list(range(len(domains)))
        if self.order == "published":
            path.sort(key=lambda index: _published_place(domains[index].name))
        samples = [
            correlated_order(labels[index], self.gamma, self.slots, generator(seed, "practical", index))
            for index in path
        ]
        return one_after_the_other(domains, numbered(domains, path), samples, batch_size, announced=False, across=True)


def _published_place(name: str) -> int:
    name = name.removesuffix("_procedural")
    return _PUBLISHED_ORDER.index(name) if name in _PUBLISHED_ORDER else len(_PUBLISHED_ORDER)
