"""Properties of every order of a stream: determinism, independence, counts, hashes, arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ttalight.data import (
    BatchMixing,
    Continual,
    Correlated,
    Cross,
    Domain,
    Gradual,
    ImageArrays,
    InOut,
    LabelShift,
    Mixed,
    PerDomain,
    Potpourri,
    PracticalTTA,
    Probed,
    Recurring,
    SingleSample,
    StreamDataset,
    StreamSampler,
)

#: Every order, how many samples each visit must have over domains of 30, 41 and 25 samples and 20 clean ones, and the
#: first digits of its hash.
ORDERS = {
    "PerDomain": (PerDomain(), [30, 41, 25]),
    "PerDomain unshuffled": (PerDomain(shuffle=False), [30, 41, 25]),
    "Continual": (Continual(rounds=2), [30, 41, 25] * 2),
    "Continual random": (Continual(rounds=2, order="random"), None),
    "Gradual": (Gradual(path=[1, 3, 1]), [30, 31, 30, 41, 42, 41, 25, 26, 25]),
    "Mixed": (Mixed(), [30, 41, 25]),
    "Potpourri": (Potpourri(), [30, 41, 25]),
    "Potpourri clean": (Potpourri(clean=True), [30, 41, 25, 20]),
    "InOut": (InOut(share=0.4), [18, 12, 25, 16, 15, 10]),
    "Correlated": (Correlated(), [30, 41, 25]),
    "Correlated sorted": (Correlated(gamma=None), [30, 41, 25]),
    "Correlated mixed": (Correlated(gamma=0.5, slots=7, mixed=True), [30, 41, 25]),
    "PracticalTTA": (PracticalTTA(), [25, 41, 30]),
    "PracticalTTA given": (PracticalTTA(order="given"), [30, 41, 25]),
    "LabelShift": (LabelShift(ratio=20), [30, 41, 25]),
    "LabelShift longer": (LabelShift(samples=100), [100] * 3),
    "SingleSample": (SingleSample(), [30, 41, 25]),
    "SingleSample window": (SingleSample(Mixed(), window=4), [30, 41, 25]),
    "Cross": (Cross(), [30, 41, 25]),
    "Cross 2": (Cross(domains_per_batch=2), [30, 41, 25]),
    "Cross random": (Cross(domains_per_batch="random"), [30, 41, 25]),
    "BatchMixing": (BatchMixing(), [30, 41, 25] * 2),
    "BatchMixing shuffled": (BatchMixing(order="shuffled"), [30, 41, 25] * 2),
    "BatchMixing interval_shuffled": (BatchMixing(order="interval_shuffled"), [30, 41, 25] * 2),
    "Recurring": (Recurring(cycles=3, length=12), [12] * 9),
    "Recurring whole": (Recurring(cycles=2, overlap=0), [30, 41, 25] * 2),
    "Probed": (Probed(samples=6), [30, 41, 25, 6, 6, 6]),
    "Probed Mixed": (Probed(Mixed(), every=40), [30, 41, 25, 20, 20, 20]),
    "Probed SingleSample": (Probed(SingleSample(), every=60, samples=5), [30, 41, 25, 5, 5]),
}
HASHES = {
    "PerDomain": "23ced27d67308960",
    "PerDomain unshuffled": "ed7bc0167ce794b0",
    "Continual": "512df921bd2065e4",
    "Continual random": "1365923f8ddff80c",
    "Gradual": "e0661a071ad03554",
    "Mixed": "9fabb776a8ee751b",
    "Potpourri": "9fabb776a8ee751b",
    "Potpourri clean": "552522792b1688b8",
    "InOut": "1c7fc72298a5184f",
    "Correlated": "dfb5a3f8a4c3bffb",
    "Correlated sorted": "77df23b82453d697",
    "Correlated mixed": "ea3e0423ac06ccb0",
    "PracticalTTA": "42299ff63fa1d121",
    "PracticalTTA given": "1f2a2eb5c43fef43",
    "LabelShift": "c3fcd62c20f5656e",
    "LabelShift longer": "9992bba55e672605",
    "SingleSample": "b5159516f339146c",
    "SingleSample window": "1e3d130244993e6c",
    "Cross": "9fabb776a8ee751b",
    "Cross 2": "6efb82d60c17346a",
    "Cross random": "40904bb6cb1c0867",
    "BatchMixing": "abdf3ec3b54c0aca",
    "BatchMixing shuffled": "68bd03b7cf6b38e0",
    "BatchMixing interval_shuffled": "20506f1088cccfdf",
    "Recurring": "34a5ec4b1deadd4c",
    "Recurring whole": "839bda3351c5b18c",
    "Probed": "0fd43d1fe409b4c4",
    "Probed Mixed": "c7d978ff743296b1",
    "Probed SingleSample": "83975fc06d5fa689",
}
NAMES = ("fog", "snow", "motion_blur")
SIZES = (30, 41, 25)


def material(order, classes=5):
    """The domains that an order asks for, and their labels."""
    levels = order.severities(5)
    domains = [Domain(name, level) for name in NAMES for level in levels]
    # Domains of several severities differ in size, so that a mix-up shows.
    sizes = [size + index for size in SIZES for index in range(len(levels))]
    if order.needs_clean:
        domains, sizes = [*domains, Domain("clean")], [*sizes, 20]
    rng = np.random.default_rng(7)
    return domains, [rng.integers(0, classes, size) for size in sizes]


def build(order, batch_size=8, seed=0):
    return order.build(*material(order), batch_size, seed)


each_order = pytest.mark.parametrize("name", ORDERS)


@each_order
def test_the_same_whatever_was_drawn_before(name):
    order, _ = ORDERS[name]
    first = build(order)
    np.random.seed(5)  # noqa: NPY002  (the global generators are what must not matter)
    torch.manual_seed(5)
    np.random.random(3)  # noqa: NPY002
    assert build(order).hash == first.hash
    if name != "PerDomain unshuffled":
        assert build(order, seed=1).hash != first.hash


@each_order
def test_the_hash_is_stable(name):
    assert build(ORDERS[name][0]).hash[:16] == HASHES[name]


@each_order
def test_samples_of_each_visit_against_a_hand_loop(name):
    order, expected = ORDERS[name]
    stream = build(order)
    counted = [0] * len(stream.visits)
    scored = 0
    for index in range(stream.batches):
        positions = range(len(stream))[stream.batch(index)][stream.scored(index)]
        scored += len(positions)
        for position in positions:
            counted[int(stream.visit[position])] += 1
    assert scored == len(stream) == sum(counted)
    assert counted == stream.counts().tolist()
    if expected is not None:
        assert counted == expected


@each_order
def test_numbers_count_the_visits_before(name):
    stream = build(ORDERS[name][0])
    seen: dict[Domain, int] = {}
    for visit in stream.visits:
        domain = stream.domains[visit.domain]
        assert visit.number == seen.get(domain, 0)
        seen[domain] = visit.number + 1


@pytest.mark.parametrize(
    "name", [n for n in ORDERS if not n.startswith(("LabelShift", "Recurring", "InOut", "Probed"))]
)
def test_every_visit_shows_every_sample_once(name):
    stream = build(ORDERS[name][0])
    labels = material(ORDERS[name][0])[1]
    for index, visit in enumerate(stream.visits):
        assert sorted(stream.sample[stream.visit == index]) == list(range(len(labels[visit.domain])))


@pytest.mark.parametrize("name", [n for n in ORDERS if not n.startswith(("Cross ", "BatchMixing", "Probed"))])
def test_the_order_does_not_depend_on_the_batch_size(name):
    order, _ = ORDERS[name]
    one, other = build(order, batch_size=3), build(order, batch_size=10)
    assert np.array_equal(one.sample, other.sample)
    assert np.array_equal(one.visit, other.visit)


@pytest.mark.parametrize("name", ["Probed", "Probed Mixed", "Probed SingleSample"])
def test_order_without_probes_ignores_batch_size(name):
    order, _ = ORDERS[name]
    for size in (3, 10):
        stream = build(order, batch_size=size)
        probe = np.array([visit.probe for visit in stream.visits])[stream.visit]
        alone = order.stream.build(*(part[:-1] for part in material(order)), size, 0)
        assert np.array_equal(stream.sample[~probe], alone.sample)


@each_order
def test_loader_delivers_domain_samples(name):
    order, _ = ORDERS[name]
    domains, labels = material(order)
    stream = order.build(domains, labels, 8, 0)
    sets = [
        ImageArrays(torch.full((len(part), 3, 1, 1), index, dtype=torch.uint8), torch.from_numpy(part))
        for index, part in enumerate(labels)
    ]
    loader = DataLoader(StreamDataset(stream, sets), batch_size=None, sampler=StreamSampler(stream))
    for index, (images, classes) in enumerate(loader):
        positions = stream.batch(index)
        domain = stream.domain_of(positions)
        assert images[:, 0, 0, 0].tolist() == domain.tolist()
        assert classes.tolist() == [labels[d][s] for d, s in zip(domain, stream.sample[positions], strict=True)]
    assert index == stream.batches - 1


@each_order
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_reference_takes_sixteen_bytes_at_most(name, batch_size):
    order, _ = ORDERS[name]
    if name == "Cross 2":
        batch_size = max(batch_size, 2)
    stream = build(order, batch_size)
    size = stream.visit.nbytes + stream.sample.nbytes + stream.offsets[:-1].nbytes
    assert size <= 16 * len(stream)
    assert all(array.dtype.kind in "iu" for array in (stream.visit, stream.sample, stream.offsets))


@each_order
def test_arguments_make_it_again(name):
    order, _ = ORDERS[name]
    text = order.describe()
    assert json.loads(json.dumps(text)) == text
    inner = text.get("stream")
    if isinstance(inner, dict):
        assert inner == {"class": type(order.stream).__name__, **order.stream.describe()}
        text["stream"] = order.stream
    again = type(order)(**text)
    assert again.describe() == order.describe()
    assert build(again).hash == build(order).hash


@each_order
def test_a_batch_size_of_zero(name):
    order = ORDERS[name][0]
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0"):
        build(order, batch_size=0)


@pytest.mark.parametrize("name", ["PerDomain", "LabelShift", "SingleSample", "Probed"])
def test_announced(name):
    assert build(ORDERS[name][0]).announced


@pytest.mark.parametrize(
    "name",
    [
        *("Continual", "Gradual", "Mixed", "Potpourri", "InOut", "Correlated", "PracticalTTA", "Cross", "Cross 2"),
        *("BatchMixing", "Recurring", "SingleSample window", "Probed Mixed"),
    ],
)
def test_not_announced(name):
    assert not build(ORDERS[name][0]).announced


WITHIN = ["PerDomain", "Continual", "Gradual", "Correlated", "LabelShift", "SingleSample", "Probed"]


@pytest.mark.parametrize("name", WITHIN)
def test_no_batch_crosses_a_boundary(name):
    stream = build(ORDERS[name][0])
    assert all(len(set(stream.visit[stream.batch(index)])) == 1 for index in range(stream.batches))
