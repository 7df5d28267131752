"""RetrievalFusion against loops over its formulas."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from support.networks import small_net
from torch import nn

from ttalight.adapters import RetrievalFusion, Source
from ttalight.adapters.components.approximate_search import ApproximateSearch
from ttalight.adapters.components.neighbors import FeatureBank

ENTRIES, NEIGHBORS, TEMPERATURE = 12, 4, 0.2


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(9, 3, 12, 12, generator=generator, dtype=torch.float64)
    return [base, 1 - base.flip(0), base[:1], base[2:5] * 0.3, torch.rand(14, 3, 12, 12, dtype=torch.float64)]


def shares(row: list[float]) -> list[float]:
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / math.fsum(exponentials) for value in exponentials]


class Reference:
    """A list of entries, the oldest first."""

    def __init__(self, net: torch.nn.Sequential) -> None:
        self.net, self.entries = net, []

    def step(self, images: torch.Tensor, labels: list[int] | None = None) -> list[list[float]]:
        with torch.no_grad():
            features = self.net[:-1](images)
            logits = self.net[-1](features)
        fused, new = [], []
        for number, (vector, row) in enumerate(zip(features.tolist(), logits.tolist(), strict=True)):
            length = math.sqrt(math.fsum(value**2 for value in vector))
            unit = [value / length for value in vector]
            p = shares(row)
            fused.append(self.fuse(unit, p) if self.entries else row)
            new.append((unit, p if labels is None else [float(c == labels[number]) for c in range(len(p))]))
        self.entries = (self.entries + new)[-ENTRIES:]
        return fused

    def fuse(self, unit: list[float], p: list[float]) -> list[float]:
        cosines = [(math.fsum(a * b for a, b in zip(unit, key, strict=True)), q) for key, q in self.entries]
        nearest = sorted(cosines, key=lambda pair: -pair[0])[:NEIGHBORS]
        weights = shares([cosine / TEMPERATURE for cosine, _ in nearest])
        q = [math.fsum(w * entry[c] for w, (_, entry) in zip(weights, nearest, strict=True)) for c in range(len(p))]
        entropies = [-math.fsum(value * math.log(value) for value in each if value > 0) for each in (p, q)]
        own, other = shares([1 / (1 + entropy) for entropy in entropies])
        logs = [[math.log(value) if value > 0 else -1e4 for value in each] for each in (p, q)]
        return [own * a + other * b for a, b in zip(*logs, strict=True)]


@pytest.mark.parametrize("labelled", [True, False, None])
def test_against_loops(labelled):
    net = small_net()
    reference = Reference(net)
    settings = {"entries": ENTRIES, "neighbors": NEIGHBORS, "temperature": TEMPERATURE, "reset": "never"}
    if labelled is None:
        method = RetrievalFusion(**settings)
    else:
        images, labels = batches()[1], torch.arange(9) % 3
        reference.step(images, labels.tolist() if labelled else None)
        method = RetrievalFusion(memory="source", source=[(images, labels) if labelled else images], **settings)
    adapted = method.wrap(copy.deepcopy(net))
    for images in batches():
        before = list(reference.entries)
        expected = torch.tensor(reference.step(images), dtype=torch.float64)
        if labelled is not None:
            reference.entries = before
        predicted = adapted(images, adapt=False)
        torch.testing.assert_close(predicted, expected)
        assert torch.equal(adapted(images), predicted)


def test_an_empty_memory_is_the_source():
    net, images = small_net(), batches()[0]
    expected = Source().wrap(copy.deepcopy(net))(images)
    assert torch.equal(RetrievalFusion().wrap(copy.deepcopy(net))(images), expected)
    with pytest.warns(UserWarning, match=r"no source images, so it predicts as the network does\. Give source="):
        assert torch.equal(RetrievalFusion(memory="source").wrap(net)(images), expected)


def test_memory_is_bounded_and_holds_the_last_images():
    adapted = RetrievalFusion(entries=5, neighbors=2, reset="never").wrap(small_net())
    for images in batches():
        adapted(images)
        state = adapted.engine.method.method_state()
        assert len(state["features"]) == len(state["values"]) == 5
    torch.testing.assert_close(state["values"].sum(1), torch.ones(5, dtype=torch.float64))
    assert state["seen"] == sum(map(len, batches()))


class TestApproximateSearch:
    """Retrieval by an index of faiss. Memories are of source images."""

    @pytest.fixture(autouse=True)
    def _faiss(self):
        pytest.importorskip("faiss")

    @pytest.fixture
    def clusters(self):
        """Return 4,000 vectors around 40 centres, and 100 more."""
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(40, 32, generator=generator)
        vectors = centres.repeat(103, 1)[:4100] + 0.3 * torch.randn(4100, 32, generator=generator)
        return vectors[:4000], vectors[4000:]

    def test_recall_on_clusters(self, clusters):
        vectors, queries = clusters
        bank = FeatureBank(torch.zeros(5000, 32), torch.zeros(5000, 1, dtype=torch.int64))
        bank.add(vectors, torch.arange(4000)[:, None])
        cosines, expected = bank.nearest(queries, 10)
        for probes, least in ((8, 0.9), (10_000, 1.0)):
            found_cosines, found = ApproximateSearch(bank, probes).nearest(queries, 10)
            hits = (found == expected.transpose(1, 2)).any(2).double().mean()
            assert hits >= least
            assert found.shape == (100, 10, 1)
        torch.testing.assert_close(found_cosines, cosines)

    def test_the_index_follows_the_bank(self, clusters):
        vectors, queries = clusters
        bank = FeatureBank(torch.zeros(300, 32), torch.zeros(300, 1))
        search = ApproximateSearch(bank, 100)
        cosines, values = search.nearest(queries, 3)
        assert torch.equal(cosines, torch.full((100, 3), -torch.inf))
        assert values.shape == (100, 3, 1)
        for part in vectors.split(150)[:4]:
            bank.add(part, part[:, :1])
            for own, expected in zip(search.nearest(queries, 3), bank.nearest(queries, 3), strict=True):
                torch.testing.assert_close(own, expected)
            index = search._index
            bank.features.copy_(bank.features.clone())
            search.nearest(queries, 3)
            assert search._index is index  # equal values need no other one

    def test_few_entries(self, clusters):
        bank = FeatureBank(torch.zeros(300, 32), torch.zeros(300, 1))
        bank.add(clusters[0][:2], torch.ones(2, 1))
        cosines, _ = ApproximateSearch(bank, 1).nearest(clusters[1], 3)
        assert torch.equal(cosines.isfinite().sum(1), torch.full((100,), 2))

    @pytest.fixture
    def source(self):
        """Return 200 images, in which there are five cells."""
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(200, 3, 6, 6, generator=generator, dtype=torch.float64)
        return [(part, torch.arange(len(part)) % 4) for part in images.split(64)]

    @pytest.fixture
    def wrap(self, source):
        """Return a function that wraps a linear classifier with the method."""

        def wrap(**options):
            settings = {"entries": 200, "neighbors": NEIGHBORS, "memory": "source", "source": source, "probes": 5}
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).double()
            return RetrievalFusion(**settings | options).wrap(net)

        return wrap

    def test_with_enough_probes_it_is_exact(self, wrap, source):
        exact, adapted, fast = wrap(), wrap(search="approximate"), wrap(search="approximate", probes=1)
        for images, _ in source:
            images = images + 0.5
            torch.testing.assert_close(adapted(images), exact(images))
            assert not torch.allclose(fast(images), exact(images))
            assert fast(images).isfinite().all()
        adapted.reset()
        torch.testing.assert_close(adapted(images), exact(images))

    def test_a_saved_state_brings_its_memory(self, wrap, source):
        adapted, resumed = wrap(search="approximate"), wrap(search="approximate", source=[])
        images = source[0][0] + 0.5
        expected = adapted(images)
        resumed.load_state_dict(adapted.state_dict())
        assert torch.equal(resumed(images), expected)
        assert torch.equal(copy.deepcopy(resumed)(images), expected)

    def test_its_settings_are_in_the_protocol(self):
        protocol = RetrievalFusion(memory="source", search="approximate", probes=3).protocol()
        assert (protocol["search"], protocol["probes"]) == ("approximate", 3)


def test_approximate_search_needs_a_memory_that_stays():
    with pytest.raises(ValueError, match="search='approximate' needs memory='source'"):
        RetrievalFusion(search="approximate")
    with pytest.raises(ValueError, match="search must be 'exact' or 'approximate', got 'fast'"):
        RetrievalFusion(search="fast")
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        RetrievalFusion(probes=0)


def test_approximate_search_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"needs faiss, which is not installed: pip install 'ttalight\[retrieval\]'"):
        RetrievalFusion(memory="source", search="approximate").wrap(small_net())
