"""Streams as data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.data import Domain, ImageArrays, PerDomain, Stream, StreamDataset, StreamSampler, Visit

DOMAINS = [Domain("clean"), Domain("contrast", 5), Domain("pixelate", 5)]
LABELS = [np.arange(7), np.arange(10), np.arange(3)]


def per_domain(seed=0, shuffle=True, batch_size=4) -> Stream:
    return PerDomain(shuffle).build(DOMAINS, LABELS, batch_size, seed)


class TestPerDomain:
    def test_batches_never_cross_a_boundary_and_the_last_is_ragged(self):
        stream = per_domain()
        sizes = [len(stream.sample[stream.batch(index)]) for index in range(stream.batches)]
        assert sizes == [4, 3, 4, 4, 2, 3]
        assert all(len(set(stream.domain_of(stream.batch(index)))) == 1 for index in range(stream.batches))

    def test_every_sample_comes_once(self):
        stream = per_domain()
        for domain, labels in enumerate(LABELS):
            samples = stream.sample[stream.domain_of(slice(None)) == domain]
            assert sorted(samples) == list(range(len(labels)))

    def test_boundaries_are_announced(self):
        stream = per_domain()
        assert [stream.begins_visit(index) for index in range(stream.batches)] == [
            True,
            False,
            True,
            False,
            False,
            True,
        ]

    def test_unshuffled_order(self):
        assert per_domain(shuffle=False).sample.tolist() == [*range(7), *range(10), *range(3)]

    def test_is_a_function_of_the_seed(self):
        assert per_domain(seed=3).hash == per_domain(seed=3).hash
        assert per_domain(seed=3).hash != per_domain(seed=4).hash
        assert sorted(per_domain(seed=3).sample) == sorted(per_domain(seed=4).sample)


def test_the_hash_is_stable():
    assert per_domain(shuffle=False).hash == "227345c24c602479e8db5d7fdc80e475f29b3fb47eeeeb334062a60343fc8287"


@pytest.mark.parametrize(
    "change",
    [
        {"domains": [Domain("fog"), *DOMAINS[1:]]},
        {"visits": [Visit(0), Visit(1), Visit(1, 1)]},
        {"sample": np.arange(20)[::-1]},
        {"offsets": np.array([0, 20])},
        {"announced": False},
    ],
)
def test_the_hash_sees_everything(change):
    stream = per_domain()
    fields = {name: getattr(stream, name) for name in ("domains", "visits", "visit", "sample", "offsets", "announced")}
    assert Stream(**fields).hash == stream.hash
    assert Stream(**(fields | change)).hash != stream.hash


def test_a_reference_costs_eight_bytes():
    stream = per_domain()
    assert stream.visit.itemsize + stream.sample.itemsize == 8


def test_samples_come_from_their_domains():
    sets = [
        ImageArrays(torch.full((len(labels), 3, 2, 2), 10 * domain, dtype=torch.uint8), torch.from_numpy(labels))
        for domain, labels in enumerate(LABELS)
    ]
    rng = np.random.default_rng(0)
    visit = rng.integers(0, 3, 50)
    sample = np.array([rng.integers(len(LABELS[v])) for v in visit])
    stream = Stream(DOMAINS, [Visit(0), Visit(1), Visit(2)], visit, sample, np.array([0, 20, 50]), announced=False)
    dataset = StreamDataset(stream, sets)
    for positions in StreamSampler(stream):
        images, labels = dataset[positions]
        assert images[:, 0, 0, 0].tolist() == (10 * visit[positions]).tolist()
        assert labels.tolist() == sample[positions].tolist()
