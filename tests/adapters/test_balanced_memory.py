"""The memory of RoTTA and NOTE: limits, order, agreement with insertion one by one."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support.networks import small_net

from ttalight.adapters import RoTTA
from ttalight.adapters.components.balanced_memory import BalancedMemory, select_balanced
from ttalight.engine.adaptive_network import AdaptiveNetwork


def aged(values, ages, size=8):
    return (ages / size).sigmoid() + values


def constant(values, ages):
    return values


@pytest.fixture
def make():
    """Make a memory of images of one pixel."""

    def make(size, score=constant, limit=None):
        net = AdaptiveNetwork(small_net(), seed=0)
        net.images = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        return BalancedMemory(net, size, score, limit)

    return make


def stream(count, classes, seed=0):
    """Numbers as images, classes of which the first are frequent, and values."""
    generator = torch.Generator().manual_seed(seed)
    shares = 0.5 ** torch.arange(classes)
    drawn = torch.multinomial(shares, count, replacement=True, generator=generator)
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.arange(count, dtype=torch.float64).view(-1, 1, 1, 1), drawn, values


def insert(memory, images, classes, values, part):
    for begin in range(0, len(images), part):
        memory.insert(images[begin : begin + part], classes[begin : begin + part], values[begin : begin + part])


def content(memory):
    """Number, class, value and age of each image in the memory."""
    count = int(memory.count())
    assert not memory.entries[count:].any()
    numbers = memory.images[:count].flatten().tolist()
    return sorted(zip(numbers, *memory.entries[:count].T.tolist(), strict=True))


class OneByOne:
    """CSTU as its authors fill it: one image after another, each compared with those that are there."""

    def __init__(self, size, classes, score):
        self.size, self.classes, self.score = size, classes, score
        self.items = []

    def add(self, number, label, value):
        own = [item for item in self.items if item["label"] == label]
        counts = [sum(item["label"] == other for item in self.items) for other in range(self.classes)]
        if len(own) >= self.size / self.classes:
            rivals = own
        elif len(self.items) < self.size:
            rivals = None
        else:
            rivals = [item for item in self.items if counts[item["label"]] == max(counts)]
        worst = max(rivals, key=self.of, default=None) if rivals is not None else None
        if worst is None or self.of(worst) > self.score(torch.tensor(value), torch.tensor(0.0)):
            self.items = [item for item in self.items if item is not worst]
            self.items.append({"number": number, "label": label, "value": value, "age": 0})
        for item in self.items:
            item["age"] += 1

    def of(self, item):
        return float(self.score(torch.tensor(item["value"], dtype=torch.float64), torch.tensor(float(item["age"]))))

    def content(self):
        return sorted(tuple(item[name] for name in ("number", "label", "value", "age")) for item in self.items)


@pytest.mark.parametrize(("score", "part"), [(aged, 1), (constant, 1), (constant, 5)])
@pytest.mark.parametrize("classes", [2, 4])
def test_is_that_of_insertion_one_by_one(make, score, part, classes):
    memory, expected = make(8, score, limit=8 // classes), OneByOne(8, classes, score)
    images, labels, values = stream(60, classes)
    for begin in range(0, 60, part):
        piece = slice(begin, begin + part)
        memory.insert(images[piece], labels[piece], values[piece])
        for number, label, value in zip(range(begin, 60), labels[piece].tolist(), values[piece].tolist(), strict=False):
            expected.add(number, label, value)
        assert content(memory) == expected.content()


def test_a_full_class_replaces_its_highest_score_and_an_empty_place_takes_any(make):
    memory, expected = make(8, aged, limit=2), OneByOne(8, 5, aged)  # 8 / 5 of a class, rounded up
    images, labels, values = stream(40, 3)  # fewer than 8 are kept
    insert(memory, images, labels, values, 1)
    for number in range(40):
        expected.add(number, int(labels[number]), float(values[number]))
    assert content(memory) == expected.content()
    assert memory.count() == 6


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("part", [3, 7, 64])
def test_limits_order_and_balance(make, part, limit):
    classes = 6
    memory = make(16, constant, limit)
    images, labels, values = stream(400, classes)
    most = 16 if limit is None else limit
    for begin in range(0, 400, part):
        insert(memory, *(value[begin : begin + part] for value in (images, labels, values)), part)
        seen = min(400, begin + part)
        kept = content(memory)
        available = [int((labels[:seen] == label).sum()) for label in range(classes)]
        assert len(kept) == min(16, sum(min(most, count) for count in available))
        counts = [sum(label == own for _, own, *_ in kept) for label in range(classes)]
        full = [count for count, other in zip(counts, available, strict=True) if count < other]
        assert max(counts) <= most
        assert not full or max(full) - min(full) <= 1
        for label, count in enumerate(counts):
            lowest = values[:seen][labels[:seen] == label].sort().values[:count].tolist()
            assert sorted(value for _, own, value, _ in kept if own == label) == lowest
        assert all(age == seen - number for number, *_, age in kept)


def test_splits_make_no_difference_where_scores_stay(make):
    images, labels, values = stream(200, 5)
    kept = []
    for parts in ([200], [1] * 200, [64, 64, 64, 8], random.Random(0).choices(range(1, 20), k=60)):
        memory, begin = make(16, constant, 4), 0
        for part in parts:
            piece = slice(begin, begin + part)
            memory.insert(images[piece], labels[piece], values[piece])
            begin += part
        kept.append(content(memory))
    assert kept[0] == kept[1] == kept[2] == kept[3]


def test_a_new_class_takes_a_place_of_a_largest_one(make):
    memory = make(4, constant, limit=4)
    memory.insert(torch.arange(4.0).view(-1, 1, 1, 1), torch.tensor([0, 0, 0, 1]), torch.tensor([0.1, 0.3, 0.2, 0.9]))
    memory.insert(torch.full((1, 1, 1, 1), 4.0), torch.tensor([2]), torch.tensor([5.0]))
    assert [number for number, *_ in content(memory)] == [0, 2, 3, 4]


def test_scores_that_are_not_finite_are_not_kept(make):
    memory = make(4)
    memory.insert(torch.arange(3.0).view(-1, 1, 1, 1), torch.tensor([0, 0, 1]), torch.tensor([math.nan, 0.5, math.inf]))
    assert [number for number, *_ in content(memory)] == [1]
    assert memory.entries.isfinite().all()


def test_equal_scores_keep_the_first():
    places, kept = select_balanced(torch.tensor([1, 1, 0, 1]), torch.tensor([2.0, 2.0, 2.0, 1.0]), size=3, limit=2)
    assert places.tolist() == [3, 2, 0]
    assert kept.all()


# -- in a method


def test_holds_no_more_than_its_tensors(make):
    adapted = RoTTA(memory=4).wrap(small_net())
    shapes = None
    for count in (3, 1, 40):
        adapted(torch.rand(count, 3, 12, 12, dtype=torch.float64))
        tensors = adapted.state_dict()["tensors"]
        found = {name: value.shape for name, value in tensors.items() if "memory" in name}
        assert shapes in (None, found)
        shapes = found
    assert shapes["method.memory.images"] == (4, 3, 12, 12)


def test_images_of_another_size_are_an_error():
    adapted = RoTTA(memory=4).wrap(small_net())
    adapted(torch.rand(3, 3, 12, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"memory holds images of shape \(3, 12, 12\) and got \(3, 16, 16\): scale"):
        adapted(torch.rand(3, 3, 16, 16, dtype=torch.float64))


def test_dense_predictions_are_an_error():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1)).double()
    with pytest.raises(ValueError, match=r"got logits of shape \(3, 4, 10, 10\): for dense outputs use a method"):
        RoTTA().wrap(net.eval())(torch.rand(3, 3, 12, 12, dtype=torch.float64))


def test_other_tensors_of_a_call_are_an_error():
    class Masking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, images, mask=None, scale=1.0):
            return scale * self.net(images if mask is None else images * mask)

    images = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    adapted = RoTTA(memory=2).wrap(Masking())
    assert adapted(images, scale=2.0).shape == (3, 4)
    with pytest.raises(TypeError, match="RoTTA passes images of earlier calls again"):
        adapted(images, mask=torch.ones_like(images))
    assert adapted.engine.updates == 1


def test_a_state_without_images_in_its_memory_is_an_error():
    images = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    adapted = RoTTA(memory=2).wrap(small_net())
    adapted(images)
    state = adapted.state_dict()
    del state["tensors"]["method.memory.images"]
    with pytest.raises(ValueError, match="no images in the memory"):
        RoTTA(memory=2).wrap(small_net()).load_state_dict(state)
