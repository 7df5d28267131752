"""RetrievalFusion against loops over its formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.networks import small_net

from ttalight.adapters import RetrievalFusion, Source

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
