"""DPE against loops over images, views and lists of cached features, with torch's AdamW."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ttalight.adapters import DPE
from ttalight.adapters.views import EpisodicViewAdapter
from ttalight.tasks import VisionLanguageTask

SETTINGS = {"cache_size": 2, "lr": 0.03, "threshold": 0.25, "share": 0.4, "cache_weight": 2.0, "augmix": False}


class Reader(EpisodicViewAdapter):
    least_views = 1

    def merge(self, net, logits, features):
        self.seen = features
        return logits[:, 0]


def make_net(classes: int = 4) -> nn.Module:
    torch.manual_seed(3)
    tower = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).double()
    text = torch.randn(classes, 6, dtype=torch.float64)
    return VisionLanguageTask(text, image_tower=tower, scale=10.0).double().eval()


def batches() -> list[torch.Tensor]:
    images = torch.rand(14, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return list((images - 0.5).sign().mul(0.4).add(0.5).split([5, 3, 1, 5]))


def entropy(p):
    return -(p * p.log()).sum()


class Reference:
    def __init__(self, net) -> None:
        self.text, self.scale, self.count, self.cache = net.classifier.weight.data.clone(), 10.0, 0, {}

    def keys(self, classes):
        return torch.stack([torch.stack([unit for _, unit in self.cache[label]]).mean(0) for label in classes])

    def read(self, unit, keys, classes):
        return torch.zeros(4).double().index_add(0, torch.tensor(classes), 2.0 * torch.exp(5.0 * (keys @ unit - 1)))

    def image(self, units):
        rows = torch.zeros_like(self.text, requires_grad=True)
        logits = self.scale * units @ F.normalize(self.text + rows, dim=1).T
        order = sorted(range(len(units)), key=lambda view: entropy(logits[view].detach().softmax(0)).item())
        kept = order[: max(1, int(0.4 * len(units)))]
        own, unit = logits[kept].mean(0), units[kept].mean(0)
        label, value = int(own.argmax()), float(entropy(logits[kept].softmax(1).mean(0)))
        self.cache[label] = sorted([*self.cache.get(label, []), (value, unit)], key=lambda entry: entry[0])[:2]
        classes = sorted(self.cache)
        keys = self.keys(classes)
        moves = torch.zeros_like(keys, requires_grad=True)
        moved, texts = F.normalize(keys + moves, dim=1), F.normalize(self.text + rows, dim=1)
        loss = entropy((own + self.read(unit, moved, classes)).softmax(0))
        loss = loss + 0.5 * F.cross_entropy(moved @ texts[classes].T / 0.01, torch.arange(len(classes)))
        optimizer = torch.optim.AdamW([rows, moves], lr=0.03, eps=1e-3, weight_decay=0.1)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            texts, moved = F.normalize(self.text + rows, dim=1), F.normalize(keys + moves, dim=1)
            final = self.scale * texts @ units[0] + self.read(units[0], moved, classes)
            if entropy(final.softmax(0)) / math.log2(4) < 0.25:
                self.count += 1
                self.text = self.text * (self.count / (self.count + 1)) + texts / (self.count + 1)
        return final


@pytest.mark.parametrize("views", [1, 7])
def test_against_loops_with_a_resume_in_the_middle(views):
    net = make_net()
    reference, reader = Reference(net), Reader(views=views, seed=0, reset="never").wrap(copy.deepcopy(net))
    adapted = DPE(views=views, seed=0, reset="never", **SETTINGS).wrap(copy.deepcopy(net))
    for number, images in enumerate(batches()):
        if number == 2:
            state = adapted.state_dict()
            adapted = DPE(views=views, seed=0, reset="never", **SETTINGS).wrap(copy.deepcopy(net))
            adapted.load_state_dict(state)
        reader(images)
        expected = [reference.image(units) for units in reader.engine.method.seen]
        torch.testing.assert_close(adapted(images), torch.stack(expected), rtol=1e-6, atol=1e-6)
    state = adapted.engine.method.method_state()
    torch.testing.assert_close(state["texts"], reference.text, rtol=1e-6, atol=1e-6)
    assert 0 < state["followed"] == reference.count < 14
    for label, entries in reference.cache.items():
        assert state["cache.entropies"][label, : len(entries)].tolist() == pytest.approx([one[0] for one in entries])


def test_batches_of_any_size_are_the_same_stream():
    stream, results = torch.cat(batches()), []
    for size in (1, 4, 14):
        adapted = DPE(views=1, reset="never", **SETTINGS).wrap(make_net())
        results.append(torch.cat([adapted(images) for images in stream.split(size)]))
    torch.testing.assert_close(results[1:], results[:1] * 2)


def test_nothing_learned_is_the_network():
    adapted = DPE(views=4, **SETTINGS | {"lr": 0.0, "cache_weight": 0.0}).wrap(make_net())
    for images in batches():
        torch.testing.assert_close(adapted(images), make_net()(images))


def test_a_prediction_before_the_first_image_is_finite():
    adapted = DPE(views=4, **SETTINGS).wrap(make_net())
    assert adapted(batches()[0], adapt=False).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_size": 0}, "cache_size must be at least 1"),
        ({"lr": -1.0}, "lr must be at least 0 and finite"),
        ({"alignment": math.inf}, "alignment must be at least 0 and finite"),
        ({"share": 0.0}, "share must lie in"),
        ({"views": 0}, "views must be at least 1"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DPE(**settings)


def test_all_settings_are_in_the_protocol():
    assert SETTINGS.items() <= DPE(**SETTINGS).protocol().items()
