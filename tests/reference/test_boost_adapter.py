"""BoostAdapter against loops over images, crops and lists of cached features."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ttalight.adapters import TDA, BoostAdapter
from ttalight.adapters.views import EpisodicViewAdapter

SETTINGS = {"positive_size": 2, "negative_size": 1, "entropy_range": (0.1, 0.6), "probability_range": (0.05, 0.9)}
VIEWS, SHARE = 9, 0.4


class Reader(EpisodicViewAdapter):
    def merge(self, net, logits, features):
        self.seen = logits, F.normalize(features, dim=2)
        return logits[:, 0]


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 4))
    nn.init.normal_(net[2].weight, std=6.0)
    return net.double().eval()


def batches() -> list[torch.Tensor]:
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return list(images.split([7, 3, 1, 9]))


def entropy(row):
    return -math.fsum(value * math.log(value) for value in row.softmax(0).tolist() if value > 0)


def insert(cache, label, entry, size):
    cache[label] = sorted([*cache.get(label, []), entry], key=lambda one: one[0])[:size]


class Reference:
    def __init__(self, crop_places: int) -> None:
        self.method, self.crop_places = TDA(**SETTINGS), crop_places
        self.positive, self.negative = {}, {}

    def image(self, logits, units):
        method, own = self.method, logits[0]
        label, p, value = int(own.argmax()), own.softmax(0), entropy(own)
        insert(self.positive, label, (value, units[0], [label]), method.positive_size)
        lower, upper = method.entropy_range
        if lower < value / math.log2(len(own)) < upper:
            lower, upper = method.probability_range
            marks = [number for number, each in enumerate(p.tolist()) if lower < each < upper]
            insert(self.negative, label, (value, units[0], marks), method.negative_size)
        boosted = {number: list(entries) for number, entries in self.positive.items()}
        order = sorted(range(VIEWS), key=lambda view: entropy(logits[view]))[: int(SHARE * VIEWS)]
        for view in order:
            label = int(logits[view].argmax())
            entry = (entropy(logits[view]), units[view], [label])
            insert(boosted, label, entry, method.positive_size + self.crop_places)
        result = own.clone()
        for cache, weight, sharpness in (
            (boosted, method.positive_weight, method.positive_sharpness),
            (self.negative, -method.negative_weight, method.negative_sharpness),
        ):
            for _, unit, labels in (entry for entries in cache.values() for entry in entries):
                result[labels] += weight * torch.exp(-sharpness * (1 - units[0] @ unit))
        return result


def run(crop_places, stream):
    net = make_net()
    made = BoostAdapter(crop_places=crop_places, share=SHARE, views=VIEWS, seed=0, reset="never", **SETTINGS)
    adapted, reader = made.wrap(copy.deepcopy(net)), Reader(views=VIEWS, seed=0, reset="never").wrap(net)
    for images in stream:
        logits = adapted(images)
        reader(images)
        yield logits, reader.engine.method.seen, adapted


@pytest.mark.parametrize("crop_places", [0, 1, 3])
def test_against_loops(crop_places):
    reference = Reference(crop_places)
    for logits, seen, adapted in run(crop_places, batches()):
        expected = torch.stack([reference.image(*pair) for pair in zip(*seen, strict=True)])
        torch.testing.assert_close(logits, expected)
        for name, cache in (("positive", reference.positive), ("negative", reference.negative)):
            kept = adapted.engine.method.method_state()[f"{name}.entropies"]
            for number, entries in cache.items():
                assert kept[number, : len(entries)].tolist() == pytest.approx([entry[0] for entry in entries])
    assert len(reference.positive) > 1
    assert reference.negative


def test_crops_make_a_difference_and_leave_the_caches_alone():
    stream = batches()
    results = {places: list(run(places, stream)) for places in (0, 3)}
    assert any(not torch.allclose(a[0], b[0]) for a, b in zip(*results.values(), strict=True))
    states = [result[-1][2].engine.method.method_state() for result in results.values()]
    torch.testing.assert_close(*states)
    plain = TDA(reset="never", **SETTINGS).wrap(make_net())
    for images in stream:
        plain(images)
    torch.testing.assert_close(plain.engine.method.method_state(), states[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_places": -1}, "crop_places must be at least 0"),
        ({"share": 2.0}, "share must lie in"),
        ({"views": 1}, "views must be at least 2"),
        ({"positive_size": 0}, "positive_size must be at least 1"),
        ({"norm": "batch"}, "norm must be 'source'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        BoostAdapter(**settings)


def test_all_settings_are_in_the_protocol():
    protocol = BoostAdapter(crop_places=1, share=0.2, views=5, positive_size=4).protocol()
    assert {"crop_places": 1, "share": 0.2, "views": 5, "positive_size": 4}.items() <= protocol.items()
