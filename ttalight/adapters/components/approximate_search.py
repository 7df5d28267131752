"""Approximate search for the nearest features of a bank, by an index of faiss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ttalight.adapters.components.neighbors import FeatureBank
from ttalight.errors import MissingPackageError
from ttalight.losses.similarity import unit_vectors

__all__ = ["ApproximateSearch", "load_faiss"]

#: Vectors for each cell that faiss wants to find the cells from; with fewer it warns.
_VECTORS_A_CELL = 39


def load_faiss() -> Any:
    """Return the package faiss.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise MissingPackageError(
            "search='approximate' needs faiss, which is not installed: pip install 'ttalight[retrieval]'"
        ) from None
    return faiss


class ApproximateSearch:
    """Searches a bank of features in a few cells, instead of all of it.

    The vectors are divided into cells by k-means, and only those in the ``probes`` cells nearest to a feature are
    compared with it. The index is made of the bank's tensors when it is first asked, and again when these have changed.
    It holds a copy of the vectors, and works on the CPU: those of another device are copied to it.

    Args:
        bank: The bank.
        probes: Cells that are searched.
    """

    def __init__(self, bank: FeatureBank, probes: int) -> None:
        self.bank, self.probes = bank, probes
        self._index: Any = None
        self._seen: Tensor | None = None
        self._version = -1

    @torch.no_grad()
    def nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return cosines and values of near vectors, as ``FeatureBank.nearest`` does of the nearest.

        Args:
            features: (B, D).
            count: Number k of vectors; all of the bank where it is smaller.

        Returns:
            Cosines, (B, k), minus infinity where no further vector was found, and values, (B, k, ...).
        """
        self._update()
        bank, units = self.bank, unit_vectors(features)
        count = min(count, len(bank.features))
        if self._index is None:
            places = units.new_full((len(units), count), -1, dtype=torch.int64)
        else:
            found = self._index.search(_on_host(units), count)[1]
            places = torch.from_numpy(found).to(units.device)
        kept = places.clamp(min=0)
        near = unit_vectors(bank.features[kept.flatten()]).view(*kept.shape, -1)
        cosines = torch.einsum("bd,bkd->bk", units, near)
        return cosines.masked_fill(places < 0, -torch.inf), bank.values[kept]

    def _update(self) -> None:
        """Make the index where there is none of the present vectors."""
        features, version = self.bank.features, self.bank.features._version
        if version == self._version:
            return
        added = features[: int(self.bank.seen)]
        if self._seen is None or not torch.equal(self._seen, added):
            self._seen = added.clone()
            self._index = _index_of(added, self.probes) if len(added) else None
        self._version = version


def _index_of(features: Tensor, probes: int) -> Any:
    """Return an index of vectors, (M, D), by their cosines."""
    faiss, vectors = load_faiss(), _on_host(unit_vectors(features))
    cells = min(round(4 * math.sqrt(len(vectors))), len(vectors) // _VECTORS_A_CELL)
    index = faiss.IndexFlatIP(vectors.shape[1])
    if cells > 1:
        index = faiss.IndexIVFFlat(index, vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.nprobe = min(probes, cells)
    index.add(vectors)
    return index


def _on_host(vectors: Tensor) -> Any:
    return vectors.detach().float().cpu().contiguous().numpy()
