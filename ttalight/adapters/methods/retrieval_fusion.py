"""RetrievalFusion: the network's prediction fused with those of the nearest features in a memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.approximate_search import ApproximateSearch, load_faiss
from ttalight.adapters.components.neighbors import FeatureBank
from ttalight.adapters.feature import FeatureAdapter
from ttalight.adapters.source_data import SourceDataAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import bounded, entropy, is_masked, log_probabilities
from ttalight.models.network import Network

__all__ = ["RetrievalFusion", "fuse_by_entropy", "weighted_log_probabilities"]


class RetrievalFusion(SourceDataAdapter, FeatureAdapter):
    """Fuses each prediction with those of the nearest features in a memory. Nothing is learned.

    The memory holds unit vectors of features, and class probabilities. For each image the ``neighbors`` entries with
    the largest cosines are fetched and weighed by a softmax of cosine / ``temperature``. Their mean probabilities are a
    second prediction. Logarithms of both are added with shares that grow as the entropy of a prediction falls. Of the
    stream, each batch enters the memory with the network's own predictions after it is predicted, in place of the
    oldest entries. One forward, and one product of (B, D) with (D, M), a batch.

    Source: the fusion by entropy and the fetching of nearest entries are those of X. Tang et al., *Retrieve-then-Adapt:
    Retrieval-Augmented Test-Time Adaptation for Sequential Recommendation*, WWW 2026, arXiv 2604.05379. Its attention,
    which is trained on the source, is left out: weights by similarity stand in for it. It is a method for sequences of
    items, and no paper has tried this on images.

    Args:
        memory: ``stream`` for a memory of the stream, or ``source`` for one of source images that does not change.
            Source images have their labels where they come with them, and else the network's predictions.
        entries: Largest number M of entries.
        neighbors: Entries that are fetched for an image.
        temperature: Of the weights, above 0.
        norm: Statistics of BatchNorm layers, ``source`` or ``batch``.
        search: ``exact`` compares each image with all entries. ``approximate``, for a large memory of source images,
            divides them into cells and compares with those in a few; it needs faiss (``ttalight[retrieval]``).
        probes: Cells that approximate search looks into. As many as there are cells, 4 times the root of the number of
            entries and at most one for each 39 of them, make it exact.
        kwargs: See ``SourceDataAdapter``.

    Raises:
        ValueError: If an argument is out of range, or approximate search is asked for a memory of the stream. At the
            first batch, if the classifier cannot be found.
        ImportError: In ``wrap``, if approximate search is asked for and faiss is not installed.
    """

    images_are_for = ("fetches predictions of similar images", "a memory")

    def __init__(
        self,
        memory: Literal["stream", "source"] = "stream",
        entries: int = 4096,
        neighbors: int = 10,
        temperature: float = 0.1,
        norm: Literal["source", "batch"] = "source",
        search: Literal["exact", "approximate"] = "exact",
        probes: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(norm=norm, **kwargs)
        if memory not in ("stream", "source"):
            raise InputError(f"memory must be 'stream' or 'source', got {memory!r}")
        for name, value in (("entries", entries), ("neighbors", neighbors), ("probes", probes)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if neighbors > entries:
            raise InputError(f"neighbors must be at most entries ({entries}), got {neighbors}")
        if not temperature > 0:
            raise InputError(f"temperature must be positive, got {temperature}")
        if search not in ("exact", "approximate"):
            raise InputError(f"search must be 'exact' or 'approximate', got {search!r}")
        if search == "approximate" and memory == "stream":
            raise InputError(
                "search='approximate' needs memory='source': a memory of the stream changes in every batch"
            )
        self.memory, self.entries, self.neighbors = memory, entries, neighbors
        self.temperature = temperature
        self.search, self.probes = search, probes

    def check(self, net: Network) -> None:
        """Check the classifier and the layers, and that faiss is there where it is asked for."""
        super().check(net)
        if self.search == "approximate":
            load_faiss()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with an empty memory, or with that of source images."""
        super().configure(net)
        weight = net.head.weight
        empty = weight.new_zeros(self.entries, weight.shape[1]), weight.new_zeros(self.entries, len(weight))
        self._bank = FeatureBank(*empty)
        self._searched = self._bank if self.search == "exact" else ApproximateSearch(self._bank, self.probes)
        if self.memory == "source" and net.images is not None:
            self._read_source(net)

    def _read_source(self, net: AdaptiveNetwork) -> None:
        """Fill the memory with source images."""
        without, instead = "it predicts as the network does", ", or set memory='stream'"
        for batch in self.source_batches(net, self.entries, without, instead) or ():
            logits, features = self.read(net, batch.images.to(net.device))
            predictions = logits.softmax(1)
            if batch.labels is not None:
                predictions = F.one_hot(batch.labels.to(net.device), logits.shape[1]).to(logits.dtype)
            self._bank.add(features, predictions)

    def method_state(self) -> dict[str, Tensor]:
        """Return the memory, and the number of images that have entered it."""
        return self._bank.state

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the network and the memory, then insert it."""
        logits, features = self.read(net, images)
        fused = self._fuse(logits, features)
        if self.memory == "stream":
            self._bank.add(features, logits.softmax(1))
        return fused

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the network and the present memory."""
        return self._fuse(*self.read(net, images))

    def _fuse(self, logits: Tensor, features: Tensor) -> Tensor:
        cosines, predictions = self._searched.nearest(features, self.neighbors)
        retrieved = weighted_log_probabilities(cosines / self.temperature, predictions).to(logits.dtype)
        fused = fuse_by_entropy(logits, retrieved).masked_fill(is_masked(logits), -torch.inf)
        return torch.where(cosines.amax(1, keepdim=True) == -torch.inf, logits, fused)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError(
            "RetrievalFusion fuses predictions with those of a memory behind the network, so there is no network to "
            "export"
        )

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("memory", "entries", "neighbors", "temperature", "search", "probes")
        return super().protocol() | {name: getattr(self, name) for name in names}


def weighted_log_probabilities(similarities: Tensor, predictions: Tensor) -> Tensor:
    """Return the logarithm of the mean of predictions, weighed by a softmax of similarities, (B, C).

    Args:
        similarities: (B, K).
        predictions: Class probabilities, (B, K, C).
    """
    return torch.einsum("bk,bkc->bc", similarities.softmax(1), predictions).log()


def fuse_by_entropy(logits: Tensor, others: Tensor) -> Tensor:
    """Return the weighted mean of the log-probabilities of two predictions, (B, C).

    A prediction of entropy H weighs in proportion to exp(1 / (1 + H)).

    Args:
        logits: (B, C).
        others: (B, C).
    """
    shares = torch.stack([1 / (1 + entropy(each)) for each in (logits, others)]).softmax(0)
    first, second = (bounded(log_probabilities(each)) for each in (logits, others))
    return shares[0, :, None] * first + shares[1, :, None] * second
