"""TDA against loops over images and lists of cached features, and what must not change its predictions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.networks import embedding_net
from torch import nn

from ttalight.adapters import TDA, Source
from ttalight.adapters.components.class_cache import ClassCache, places_along_batch

SETTINGS = {"positive_size": 2, "negative_size": 1, "entropy_range": (0.1, 0.6), "probability_range": (0.05, 0.9)}


def batches(sizes=(9, 4, 1, 12, 3)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(sum(sizes), 3, 2, 2, generator=generator, dtype=torch.float64)
    return list(images.split(list(sizes)))


class Reference:
    """Two dicts of lists, as they are after each image."""

    def __init__(self, net: nn.Sequential, settings: dict) -> None:
        self.net, self.method = net, TDA(**settings)
        self.positive: dict[int, list] = {}
        self.negative: dict[int, list] = {}

    def step(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.net[:-1](images)
            logits = self.net[-1](features)
        return torch.stack([self.image(*pair) for pair in zip(features, logits, strict=True)])

    def image(self, feature: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        method, row = self.method, logits.tolist()
        top = max(row)
        exponentials = [math.exp(value - top) for value in row]
        p = [value / math.fsum(exponentials) for value in exponentials]
        entropy = -math.fsum(value * math.log(value) for value in p if value > 0)
        length = math.sqrt(math.fsum(value**2 for value in feature.tolist()))
        unit = [value / length if length else 0.0 for value in feature.tolist()]
        predicted = row.index(top)
        self.keep(self.positive, predicted, (entropy, unit, [predicted]), method.positive_size)
        lower, upper = method.entropy_range
        if lower < entropy / math.log2(len(row)) < upper:
            lower, upper = method.probability_range
            marked = [number for number, value in enumerate(p) if lower < value < upper]
            self.keep(self.negative, predicted, (entropy, unit, marked), method.negative_size)
        for cache, weight, sharpness in (
            (self.positive, method.positive_weight, method.positive_sharpness),
            (self.negative, -method.negative_weight, method.negative_sharpness),
        ):
            for entry in (entry for kept in cache.values() for entry in kept):
                cosine = math.fsum(a * b for a, b in zip(unit, entry[1], strict=True))
                for number in entry[2]:
                    row[number] += weight * math.exp(-sharpness * (1 - cosine))
        return torch.tensor(row, dtype=torch.float64)

    @staticmethod
    def keep(cache: dict[int, list], predicted: int, entry: tuple, size: int) -> None:
        kept = cache.setdefault(predicted, [])
        if len(kept) < size:
            kept.append(entry)
        elif entry[0] < kept[-1][0]:
            kept[-1] = entry
        kept.sort(key=lambda one: one[0])


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_against_loops_with_a_resume_in_the_middle(classes):
    net = embedding_net(classes)
    reference = Reference(net, SETTINGS)
    adapted = TDA(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
    for number, images in enumerate(batches()):
        if number == 2:
            state = adapted.state_dict()
            adapted = TDA(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
            adapted.load_state_dict(state)
        torch.testing.assert_close(adapted(images), reference.step(images))
        for name, cache in (("positive", reference.positive), ("negative", reference.negative)):
            check(adapted.engine.method.method_state(), name, cache)
    assert len(reference.positive) > 1
    assert reference.negative
    assert max(map(len, reference.positive.values())) == 2


def check(state, name, cache):
    entropies = state[f"{name}.entropies"]
    for number, kept in enumerate(entropies.tolist()):
        entries = cache.get(number, [])
        assert kept[: len(entries)] == pytest.approx([entry[0] for entry in entries])
        assert set(kept[len(entries) :]) <= {math.inf}
        for place, entry in enumerate(entries):
            assert state[f"{name}.features"][number, place].tolist() == pytest.approx(entry[1])
            if name == "negative":
                assert state["negative.marks"][number, place].nonzero()[:, 0].tolist() == entry[2]


def run(net, settings, stream):
    adapted = TDA(reset="never", **settings).wrap(copy.deepcopy(net))
    return torch.cat([adapted(images) for images in stream]), adapted


def test_batches_of_any_size_are_the_same_stream():
    net, stream = embedding_net(), torch.cat(batches())
    whole, adapted = run(net, SETTINGS, [stream])
    for size in (1, 4, 10):
        logits, other = run(net, SETTINGS, stream.split(size))
        torch.testing.assert_close(logits, whole)
        states = (each.engine.method.method_state() for each in (adapted, other))
        torch.testing.assert_close(*states)


def test_classes_in_another_order():
    net, order = embedding_net(), torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(net)
    other[-1].weight.data, other[-1].bias.data = net[-1].weight.data[order], net[-1].bias.data[order]
    torch.testing.assert_close(run(other, SETTINGS, batches())[0], run(net, SETTINGS, batches())[0][:, order])


def test_empty_caches_are_the_network_bit_for_bit():
    net, images = embedding_net(), batches()[0]
    expected = Source().wrap(copy.deepcopy(net))(images)
    adapted = TDA(reset="never").wrap(net)
    assert torch.equal(adapted(images, adapt=False), expected)
    adapted(images)
    assert not torch.equal(adapted(images, adapt=False), expected)
    adapted.reset()
    assert torch.equal(adapted(images, adapt=False), expected)
    weightless = TDA(positive_weight=0.0, negative_weight=0.0).wrap(copy.deepcopy(net))
    adapted.release()
    assert torch.equal(weightless(images), expected)


def test_a_thousand_classes():
    net = embedding_net(1000)
    reference = Reference(net, SETTINGS)
    adapted = TDA(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
    for images in batches((3, 4)):
        torch.testing.assert_close(adapted(images), reference.step(images))


def test_places_of_equal_entropies():
    kept = torch.tensor([[0.5, 1.0], [torch.inf, torch.inf]])
    classes, entropies = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0.5, 0.2, 0.7, torch.inf, 0.5])
    places = places_along_batch(kept, classes, entropies)
    assert places[:, :4].clamp(max=2).tolist() == [[0, 2, 2, 2], [1, 2, 2, 2], [1, 2, 2, 2], [1, 2, 2, 2], [1, 2, 2, 2]]
    assert places[:, 4:].clamp(max=2).tolist() == [
        [1, 2, 2, 2, 2], [2, 0, 2, 2, 2], [2, 0, 0, 2, 2], [2, 0, 0, 2, 2], [2, 0, 0, 2, 2],
    ]  # fmt: skip


def test_memory_is_bounded():
    cache = ClassCache(torch.zeros(3, 5), 2, marked=True)
    torch.manual_seed(0)
    for _ in range(4):
        units = nn.functional.normalize(torch.randn(7, 5), dim=1)
        cache.follow(units, torch.randint(3, (7,)), torch.rand(7), 1.0, torch.rand(7, 3) > 0.5)
    shapes = {name: tuple(value.shape) for name, value in cache.state.items()}
    assert shapes == {"features": (3, 2, 5), "entropies": (3, 2), "marks": (3, 2, 3)}
    assert cache.entropies.diff(dim=1).min() >= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive_size": 0}, "positive_size must be at least 1"),
        ({"negative_weight": -1.0}, "negative_weight must be at least 0 and finite"),
        ({"positive_sharpness": math.inf}, "positive_sharpness must be"),
        ({"entropy_range": (0.5, 0.2)}, r"entropy_range must be two numbers, 0 <= lower < upper, got \[0.5, 0.2\]"),
        ({"probability_range": (0.1,)}, "probability_range must be two numbers"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        TDA(**settings)


def test_all_settings_are_in_the_protocol():
    protocol = TDA(**SETTINGS).protocol()
    assert {name: protocol[name] for name in SETTINGS} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()
    }
    assert {"positive_weight", "positive_sharpness", "negative_weight", "negative_sharpness", "norm"} <= protocol.keys()
