"""OnZeta against loops over numbers, and what must not change its predictions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.networks import embedding_net
from torch import nn
from torch.nn.functional import cross_entropy

from ttalight.adapters import OnZeta
from ttalight.adapters.methods.onzeta import followed_proxies

SETTINGS = {"images": 20, "share": 0.7, "temperature": 0.2, "proxy_rate": 0.3, "offset_rate": 2.0, "balance": 0.9}


def batches(sizes=(9, 4, 1, 12, 3)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randn(sum(sizes), 3, 2, 2, generator=generator, dtype=torch.float64).split(list(sizes)))


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(value**2 for value in vector))
    return [value / length for value in vector]


def normalised(values: list[float]) -> list[float]:
    return [value / math.fsum(values) for value in values]


class Reference:
    """Multipliers, proxies and a count as numbers."""

    def __init__(self, net: nn.Sequential, settings: dict) -> None:
        self.net, self.method, self.count = net, OnZeta(**settings), 0
        self.proxies = [unit(row) for row in net[-1].weight.tolist()]
        self.rho = [0.0] * len(self.proxies)

    def step(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.net[:-1](images)
            logits = self.net[-1](features)
        rows = [self.image(*pair) for pair in zip(features.tolist(), logits.tolist(), strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def image(self, feature: list[float], logits: list[float]) -> list[float]:
        method, classes = self.method, len(logits)
        self.count += 1
        x, root = unit(feature), math.sqrt(self.count)
        text = normalised(
            [math.exp(value - max(logits)) * math.exp(rho) for value, rho in zip(logits, self.rho, strict=True)]
        )
        cosines = [math.fsum(a * b for a, b in zip(x, proxy, strict=True)) for proxy in self.proxies]
        vision = normalised([math.exp(cosine / method.temperature) for cosine in cosines])
        beta = method.share * math.sqrt(min(1, self.count / method.images))
        for c in range(classes):
            self.rho[c] = max(0.0, self.rho[c] - method.offset_rate / root * (text[c] - method.balance / classes))
            rate = method.proxy_rate / root / method.temperature
            moved = [w - rate * (vision[c] - text[c]) * value for w, value in zip(self.proxies[c], x, strict=True)]
            self.proxies[c] = unit(moved)
        return [math.log(beta * v + (1 - beta) * t) for v, t in zip(vision, text, strict=True)]


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_against_loops_with_a_resume_in_the_middle(classes):
    net = embedding_net(classes)
    reference = Reference(net, SETTINGS)
    adapted = OnZeta(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
    for number, images in enumerate(batches()):
        if number == 2:
            state = adapted.state_dict()
            adapted = OnZeta(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
            adapted.load_state_dict(state)
        torch.testing.assert_close(adapted(images), reference.step(images))
        state = adapted.engine.method.method_state()
        torch.testing.assert_close(state["proxies"], torch.tensor(reference.proxies, dtype=torch.float64))
        torch.testing.assert_close(state["duals"], torch.tensor(reference.rho, dtype=torch.float64))
        assert state["seen"] == reference.count
    assert max(reference.rho) > 0
    assert reference.count > SETTINGS["images"]


def run(net, settings, stream):
    adapted = OnZeta(reset="never", **settings).wrap(copy.deepcopy(net))
    return torch.cat([adapted(images) for images in stream])


def test_batches_of_any_size_are_the_same_stream():
    net, stream = embedding_net(), torch.cat(batches())
    whole = run(net, SETTINGS, [stream])
    for size in (1, 4, 10):
        torch.testing.assert_close(run(net, SETTINGS, stream.split(size)), whole)


def test_classes_in_another_order():
    net, order = embedding_net(), torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(net)
    other[-1].weight.data, other[-1].bias.data = net[-1].weight.data[order], net[-1].bias.data[order]
    torch.testing.assert_close(run(other, SETTINGS, batches()), run(net, SETTINGS, batches())[:, order])


def test_without_share_and_offsets_it_is_the_network():
    net, images = embedding_net(), batches()[0]
    predicted = run(net, {"share": 0.0, "offset_rate": 0.0}, [images, images])
    torch.testing.assert_close(predicted, torch.cat([net(images).log_softmax(1)] * 2))


def test_a_reset_begins_again_bit_for_bit():
    adapted, images = OnZeta(reset="never", **SETTINGS).wrap(embedding_net()), batches()[0]
    first = adapted(images)
    assert not torch.equal(adapted(images), first)
    adapted.reset()
    assert torch.equal(adapted(images), first)


def test_a_thousand_classes():
    net = embedding_net(1000)
    reference = Reference(net, SETTINGS)
    adapted = OnZeta(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
    for images in batches((3, 2)):
        torch.testing.assert_close(adapted(images), reference.step(images))


def test_offsets_balance_the_predictions():
    net = embedding_net(3)
    net[-1].bias.data = torch.tensor([6.0, 0.0, -2.0]).double()
    images = torch.randn(3000, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = net(images).argmax(1).bincount(minlength=3)
    adapted = OnZeta(share=0.0, reset="never").wrap(net)
    after = adapted(images).argmax(1)[1000:].bincount(minlength=3)
    assert before.min() < 300
    assert after.min() > 500


def test_long_streams_of_two_classes_stay_finite():
    net = embedding_net(2).float()
    net[-1].bias.data = torch.tensor([300.0, 0.0])
    images = torch.randn(2000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert OnZeta(reset="never").wrap(net)(images).isfinite().all()


def test_proxies_follow_the_gradient():
    torch.manual_seed(0)
    proxies, feature = torch.randn(4, 5).double().requires_grad_(), torch.randn(5).double()
    target = torch.rand(4).double().softmax(0)
    logits = proxies @ feature / 0.2
    gradient = torch.autograd.grad(cross_entropy(logits, target), proxies)[0]
    expected = nn.functional.normalize(proxies - 0.3 * gradient, dim=1)
    moved = followed_proxies(proxies.detach(), feature, logits.detach().softmax(0) - target, 0.3 / 0.2)
    torch.testing.assert_close(moved, expected.detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images must be at least 1"),
        ({"share": 1.5}, r"share must lie in \[0, 1\]"),
        ({"balance": -0.1}, r"balance must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"proxy_rate": -1.0}, "proxy_rate must be at least 0 and finite"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        OnZeta(**settings)


def test_all_settings_are_in_the_protocol():
    protocol = OnZeta(**SETTINGS).protocol()
    assert {name: protocol[name] for name in SETTINGS} == SETTINGS
