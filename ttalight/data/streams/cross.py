"""Several domains in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ttalight.data.streams.mixed import Mixed
from ttalight.data.streams.stream import Domain, Labels, Stream, StreamOrder
from ttalight.data.streams.stretches import cut_across, generator, numbered
from ttalight.errors import InputError

__all__ = ["Cross"]


class Cross(StreamOrder):
    """Batches that each hold several domains; nothing is announced.

    The dynamic scenarios of Q. Jiang, C. Ye, D. Wei, B. Wang, Y. Xue, J. Jiang and Z. Wang, *Feature-Based Instance
    Neighbor Discovery: Advanced Stable Test-Time Adaptation in Dynamic World*, NeurIPS 2025, arXiv 2506.06782, and of
    its predecessor DYN, arXiv 2406.05413. Their published code knows the random order of all samples only. With classes
    correlated as well, their cross-heterogeneous scenario, take ``Correlated`` with ``mixed: true``.

    Args:
        domains_per_batch: ``null`` for a random order of all samples, as ``Mixed``; a number K for batches with equal
            shares of K domains, drawn for each batch; ``random`` for a K drawn for each batch too, from 1 to all. Every
            sample comes once, so the last batches are made of what is left.

    Raises:
        ValueError: If the number is less than 1.
    """

    def __init__(self, domains_per_batch: int | Literal["random"] | None = None) -> None:
        is_number = isinstance(domains_per_batch, int) and not isinstance(domains_per_batch, bool)
        if not is_number and domains_per_batch not in ("random", None):
            raise InputError(f"domains_per_batch must be a number, random or null, got {domains_per_batch!r}")
        if isinstance(domains_per_batch, int) and domains_per_batch < 1:
            raise InputError(f"domains_per_batch must be at least 1, got {domains_per_batch}")
        self.domains_per_batch = domains_per_batch

    def build(self, domains: Sequence[Domain], labels: Labels, batch_size: int, seed: int) -> Stream:
        """Return the stream; see the base class for the arguments.

        Raises:
            ValueError: If there are fewer domains, or places in a batch, than domains in a batch.
        """
        if self.domains_per_batch is None:
            return Mixed().build(domains, labels, batch_size, seed)
        sizes = np.array([len(part) for part in labels])
        offsets = cut_across(int(sizes.sum()), batch_size)
        draws = generator(seed, "cross")
        most = min(len(domains), batch_size)
        if self.domains_per_batch == "random":
            kinds = draws.integers(1, most + 1, len(offsets) - 1)
        elif self.domains_per_batch <= most:
            kinds = np.full(len(offsets) - 1, self.domains_per_batch)
        else:
            raise InputError(
                f"domains_per_batch is {self.domains_per_batch}, and there are {len(domains)} domains and batches of "
                f"{batch_size}"
            )
        counts = share_out(sizes, np.diff(offsets), kinds, draws)
        order = _shuffled_batches(np.diff(offsets), draws)
        domain = np.repeat(np.tile(np.arange(len(sizes), dtype=np.uint32), len(counts)), counts.ravel())[order]
        sample = np.empty(len(domain), dtype=np.uint32)
        for index, size in enumerate(sizes.tolist()):
            sample[domain == index] = generator(seed, "cross", index).permutation(size)
        return Stream(domains, numbered(domains, range(len(domains))), domain, sample, offsets, announced=False)


def share_out(
    left: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.int64],
    draws: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Fill batches from several supplies until these are used up.

    Args:
        left: What there is of each supply, (D,).
        sizes: Size of each batch, (B,); they add up to the supplies.
        kinds: From how many supplies each batch takes, (B,). A supply is chosen the more likely the more is left of it.
        draws: Source of randomness.

    Returns:
        How much each batch takes of each supply, (B, D). Shares of a batch differ by one at most; where a supply has
        less, the fullest ones fill the gap.
    """
    left = left.copy()
    counts = np.zeros((len(sizes), len(left)), dtype=np.int64)
    done = 0
    while done < len(sizes):
        # What is left changes little over an eighth of the batches to come.
        block = slice(done, done + max(1, (len(sizes) - done) // 8))
        wanted = _shares(left, sizes[block], kinds[block], draws)
        total = np.cumsum(wanted, axis=0)
        fitting = int((total <= left).all(axis=1).cumprod().sum())
        counts[done : done + fitting] = wanted[:fitting]
        if fitting:
            left -= total[fitting - 1]
        done += fitting
        if fitting < len(wanted):
            counts[done] = _filled(wanted[fitting], left)
            left -= counts[done]
            done += 1
    return counts


def _shares(
    left: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.int64],
    draws: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Return equal shares of batches for supplies that are drawn with weights, (B, D)."""
    # The largest of log w + Gumbel noise are a draw without replacement with weights w.
    with np.errstate(divide="ignore"):
        keys = np.log(left) + draws.gumbel(size=(len(sizes), len(left)))
    rank = np.argsort(np.argsort(-keys, axis=1), axis=1)
    share, rest = (part[:, None] for part in np.divmod(sizes, kinds))
    return np.where(rank < kinds[:, None], share, 0) + np.where(rank < rest, 1, 0)


def _filled(wanted: npt.NDArray[np.int64], left: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return what a batch takes if supplies have less than it wants: the fullest ones fill the gap."""
    taken = np.minimum(wanted, left)
    gap = int(wanted.sum() - taken.sum())
    while gap:
        fullest = int(np.argmax(left - taken))
        more = min(gap, int(left[fullest] - taken[fullest]))
        taken[fullest] += more
        gap -= more
    return taken


def _shuffled_batches(sizes: npt.NDArray[np.int64], draws: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return an order of positions that is random within each batch; only the last one may be shorter."""
    whole = int(sizes[:-1].sum())
    positions = draws.permuted(np.arange(whole).reshape(len(sizes) - 1, -1), axis=1) if whole else np.arange(0)
    return np.append(positions, whole + draws.permutation(int(sizes[-1])))
