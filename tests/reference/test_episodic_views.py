"""TPS, ZERO, VTE and MTA against loops over images and views."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.networks import embedding_net
from torch import nn
from torch.nn import functional as F

from ttalight.adapters import MTA, TPS, VTE, ZERO
from ttalight.adapters.methods.zero import vote
from ttalight.adapters.views import EpisodicViewAdapter
from ttalight.tasks import VisionLanguageTask

VIEWS = 12


class Reader(EpisodicViewAdapter):
    def merge(self, net, logits, features):
        self.seen = logits, features
        return logits[:, 0]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def cosine_net(classes: int = 4) -> nn.Module:
    """Return a vision-language model whose views differ in their predictions."""
    torch.manual_seed(3)
    tower = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).double()
    text = torch.randn(classes, 6, dtype=torch.float64)
    return VisionLanguageTask(text, image_tower=tower, scale=10.0).double().eval()


def ordinary_net(classes: int = 4) -> nn.Module:
    net = embedding_net(classes)
    net[1] = nn.Linear(192, 6).double()
    net[2].weight.data *= 3
    return net


def read(net, images):
    adapted = Reader(views=VIEWS, seed=0).wrap(copy.deepcopy(net))
    adapted(images)
    logits, features = adapted.engine.method.seen
    return list(logits), list(features), adapted.engine.net.head


def entropy(row):
    p = row.softmax(0)
    return -math.fsum(value * math.log(value) for value in p.tolist() if value > 0)


def surest(logits, share):
    order = sorted(range(len(logits)), key=lambda view: entropy(logits[view]))
    return order[: max(1, int(share * len(logits)))], order


def check(adapter, images, reference, make=cosine_net):
    net = make()
    views = read(net, images)
    logits = adapter.wrap(net)(images)
    for number, (own, features) in enumerate(zip(*views[:2], strict=True)):
        torch.testing.assert_close(logits[number], reference(own, features, views[2]), rtol=1e-6, atol=1e-6)
    assert len(set(torch.stack([own.argmax(1) for own in views[0]]).flatten().tolist())) > 1
    return logits


@pytest.mark.parametrize("make", [cosine_net, ordinary_net])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_tps(images, share, make):
    def reference(own, features, head):
        kept, _ = surest(own, share)
        lengths = head.weight.norm(dim=1, keepdim=True)
        shift = torch.zeros_like(head.weight, requires_grad=True)
        bias = torch.zeros(len(head.weight)) if head.bias is None else head.bias

        def predict(rows):
            weight = lengths * F.normalize(head.weight / lengths + shift, dim=1)
            return head.scale * rows @ weight.T + bias

        with torch.enable_grad():
            p = predict(features[kept]).softmax(1).mean(0)
            optimizer = torch.optim.AdamW([shift], lr=0.02)
            (-(p * p.log()).sum()).backward()
            optimizer.step()
        return predict(features[:1])[0].detach()

    logits = check(TPS(lr=0.02, share=share, views=VIEWS, seed=0), images, reference, make)
    assert not torch.allclose(logits, make()(images))
    assert torch.equal(TPS(lr=0.0, views=VIEWS, seed=0).wrap(make())(images), make()(images))


def test_tps_in_parts_is_the_same(images, monkeypatch):
    whole = TPS(views=VIEWS, seed=0).wrap(cosine_net())(images)
    monkeypatch.setattr("ttalight.adapters.methods.tps._MOST", 60)
    torch.testing.assert_close(TPS(views=VIEWS, seed=0).wrap(cosine_net())(images), whole)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_zero(images, share):
    def reference(own, features, head):
        kept, order = surest(own, share)
        votes = [0.0] * own.shape[1]
        for view in kept:
            votes[own[view].argmax()] += 1
        tied = [number for number, count in enumerate(votes) if count == max(votes)]
        further = [int(own[view].argmax()) for view in order[len(kept) :]]
        following = own[order[min(len(kept), len(order) - 1)]].tolist()
        chosen = next((number for number in further if number in tied), max(tied, key=lambda each: following[each]))
        votes[chosen] += len(tied) > 1
        mean = own[kept].softmax(1).mean(0)
        shares = torch.tensor(votes) + 0.5 * mean
        return (shares / shares.sum()).log()

    check(ZERO(share=share, views=VIEWS, seed=0), images, reference)


def test_zero_breaks_ties():
    sure, unsure = [9.0, 0.0, 0.0], [0.0, 8.0, 0.0]
    views = [sure, unsure, [0.0, 0.1, 7.0], [0.0, 6.0, 0.0], [5.0, 0.0, 0.0]]
    shares = vote(torch.tensor([views, views[:3] + [[0.0, 0.3, 6.0]] * 2]), 2).exp()
    assert shares.argmax(1).tolist() == [1, 1]  # the fourth view votes for the second class; no view votes for one
    torch.testing.assert_close(shares.sum(1), torch.ones(2))


@pytest.mark.parametrize("make", [cosine_net, ordinary_net])
def test_vte(images, make):
    def reference(own, features, head):
        kept, _ = surest(own, 0.3)
        bias = 0.0 if head.bias is None else head.bias
        return head.scale * features[kept].mean(0) @ head.weight.T + bias

    check(VTE(share=0.3, views=VIEWS, seed=0), images, reference, make)


def test_mta(images):
    def kernel(mode, units, bandwidths):
        return torch.exp(-((units - mode).norm(dim=1) ** 2) / (2 * bandwidths**2))

    def reference(own, units, head):
        nearest = torch.cdist(units, units).sort(dim=1).values[:, 1 : int(0.3 * (VIEWS - 1)) + 1]
        bandwidths = (0.5 * (nearest**2).mean(1)).sqrt()
        p = own.softmax(1)
        scores, mode = torch.full((VIEWS,), 1 / VIEWS, dtype=torch.float64), units[0]
        for _ in range(5):
            density = kernel(mode, units, bandwidths)
            for _ in range(5):
                before = scores
                scores = ((density + 4.0 * (p @ p.T) @ scores) / 0.2).softmax(0)
                if (before - scores).norm() < 1e-6:
                    break
            for _ in range(5):
                before, weights = mode, kernel(mode, units, bandwidths) * scores
                mode = (weights[:, None] * units).sum(0) / weights.sum()
                mode = mode / mode.norm()
                if (before - mode).norm() < 1e-6:
                    break
        return head.scale * mode @ head.weight.T

    net = cosine_net()
    views = read(net, images)
    logits = MTA(views=VIEWS, seed=0).wrap(net)(images)
    for number, (own, features) in enumerate(zip(*views[:2], strict=True)):
        torch.testing.assert_close(logits[number], reference(own, features, views[2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [TPS, ZERO, VTE, MTA])
def test_images_do_not_depend_on_each_other(method, images):
    adapted = method(views=VIEWS, seed=0).wrap(ordinary_net())
    whole, engine = adapted(images), adapted.engine
    logits, features, _ = read(ordinary_net(), images)
    for number, own in enumerate(zip(logits, features, strict=True)):
        alone = engine.method.merge(engine.net, *(each[None] for each in own))
        torch.testing.assert_close(alone[0], whole[number])
    assert engine.net.forwards == VIEWS


@pytest.mark.parametrize("method", [TPS, ZERO, VTE, MTA])
def test_masked_classes_stay_masked(method, images):
    class Masking(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ordinary_net()

        def forward(self, images):
            return self.net(images).index_fill(1, torch.tensor([1]), -torch.inf)

    logits = method(views=VIEWS, seed=0).wrap(Masking())(images)
    assert logits.isneginf().nonzero()[:, 1].tolist() == [1] * len(images)
    assert logits[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TPS(lr=-1.0), "lr must be at least 0 and finite"),
        (lambda: TPS(share=0.0), r"share must lie in \(0, 1\], got 0.0"),
        (lambda: ZERO(share=1.5), "share must lie in"),
        (lambda: VTE(share=-1.0), "share must lie in"),
        (lambda: MTA(temperature=0.0), "temperature must be positive and finite"),
        (lambda: MTA(affinity_weight=math.inf), "affinity_weight must be at least 0 and finite"),
        (lambda: MTA(neighbors=0.0), "neighbors must lie in"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_settings_are_in_the_protocol():
    assert {"lr": 0.1, "share": 0.2, "views": 7}.items() <= TPS(lr=0.1, share=0.2, views=7).protocol().items()
    for method in (ZERO, VTE):
        assert method(share=0.2).protocol()["share"] == 0.2
    assert MTA(neighbors=0.5).protocol()["neighbors"] == 0.5
