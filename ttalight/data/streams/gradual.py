"""Corruptions that become stronger and weaker again."""

from __future__ import annotations

from collections.abc import Sequence

from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import domains_in_turn
from ttalight.errors import InputError

__all__ = ["Gradual"]

_UP_AND_DOWN = (1, 2, 3, 4, 5, 4, 3, 2, 1)


class Gradual(StreamOrder):
    """One corruption after the other, each from mild to strong and back; boundaries are not announced.

    All samples are shown at each severity, so results have a row for each step of the way: the mean at severity 5 is
    that over the rows with this severity. The data module's own severity is not used. Domains without severities,
    ``clean`` for one, are visited once.

    The gradual setting of Q. Wang, O. Fink, L. Van Gool and D. Dai, *Continual Test-Time Domain Adaptation*, CVPR 2022,
    arXiv 2203.13591; also R. A. Marsden, M. Döbler and B. Yang, *Introducing Intermediate Domains for Effective
    Self-Training during Test-Time*, IJCNN 2024, arXiv 2208.07736.

    Args:
        path: The severities in order.
        shuffle: Whether the samples of a visit come in random order.

    Raises:
        ValueError: If the path is empty or leaves 1 to 5.
    """

    def __init__(self, path: Sequence[int] = _UP_AND_DOWN, shuffle: bool = True) -> None:
        if not path or not set(path) <= set(range(1, 6)):
            raise InputError(f"path must have severities from 1 to 5, got {list(path)}")
        self.path = tuple(path)
        self.shuffle = shuffle

    def severities(self, severity: int) -> Sequence[int]:
        """Return those of the path, mildest first."""
        return sorted(set(self.path))

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments.

        Raises:
            ValueError: If a corruption lacks a severity of the path.
        """
        path: list[int] = []
        for name in dict.fromkeys(domain.name for domain in domains):
            levels = {domain.severity: index for index, domain in enumerate(domains) if domain.name == name}
            missing = sorted(set(self.path) - levels.keys())
            if missing and set(levels) != {0}:
                raise InputError(f"{name} is there at severities {sorted(levels)}, and the path needs {missing} too")
            path += [levels[severity] for severity in self.path] if not missing else [levels[0]]
        return domains_in_turn(domains, labels, path, batch_size, seed, announced=False, shuffle=self.shuffle)
