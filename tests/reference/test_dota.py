"""DoTA against a covariance for each class, image by image, and what must not change its predictions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.networks import embedding_net
from torch import nn

from ttalight.adapters import DoTA, Source
from ttalight.adapters.components.gaussians import gaussian_scores

SETTINGS = {"variance": 0.05, "ridge": 0.01, "growth": 0.1, "largest_weight": 0.4}


def batches(sizes=(9, 4, 1, 12, 3)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randn(sum(sizes), 3, 2, 2, generator=generator, dtype=torch.float64).split(list(sizes)))


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / math.sqrt(math.fsum(value**2 for value in vector.tolist()))


class Reference:
    """A mean, a count and a covariance for each class."""

    def __init__(self, net: nn.Sequential, settings: dict) -> None:
        self.net, self.method = net, DoTA(**settings)
        self.means = [unit(row) for row in net[-1].weight.detach()]
        self.counts = [1.0] * len(self.means)
        width = net[-1].in_features
        self.covariances = [self.method.variance * torch.eye(width).double() for _ in self.means]

    def step(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.net[:-1](images)
            logits = self.net[-1](features)
        predicted = torch.stack([self.predict(*pair) for pair in zip(features, logits, strict=True)])
        for number in range(len(self.means)):
            self.follow(number, [unit(f) for f in features], logits.softmax(1)[:, number].tolist())
        return predicted

    def pooled(self) -> torch.Tensor:
        total = math.fsum(self.counts)
        return sum(count / total * each for count, each in zip(self.counts, self.covariances, strict=True))

    def predict(self, feature: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        method, pooled = self.method, self.pooled()
        inverse = torch.linalg.inv((1 - method.ridge) * pooled + method.ridge * torch.eye(len(pooled)).double())
        weight = min(method.growth * math.fsum(self.counts) / len(self.counts), method.largest_weight)
        scores = [unit(feature) @ inverse @ mean - mean @ inverse @ mean / 2 for mean in self.means]
        return logits + weight * torch.stack(scores)

    def follow(self, number: int, units: list[torch.Tensor], shares: list[float]) -> None:
        mean, count = self.means[number], self.counts[number]
        total = count + math.fsum(shares)
        deviations = sum(p * torch.outer(f - mean, f - mean) for f, p in zip(units, shares, strict=True))
        self.covariances[number] = (count * self.covariances[number] + deviations) / total
        self.means[number] = (count * mean + sum(p * f for f, p in zip(units, shares, strict=True))) / total
        self.counts[number] = total


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_against_loops_with_a_resume_in_the_middle(classes):
    net = embedding_net(classes)
    reference = Reference(net, SETTINGS)
    adapted = DoTA(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
    for number, images in enumerate(batches()):
        if number == 2:
            state = adapted.state_dict()
            adapted = DoTA(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
            adapted.load_state_dict(state)
        torch.testing.assert_close(adapted(images), reference.step(images))
        state = adapted.engine.method.method_state()
        torch.testing.assert_close(state["means"], torch.stack(reference.means))
        torch.testing.assert_close(state["counts"], torch.tensor(reference.counts, dtype=torch.float64))
        torch.testing.assert_close(state["covariance"], reference.pooled())


def run(net, settings, stream):
    adapted = DoTA(reset="never", **settings).wrap(copy.deepcopy(net))
    return torch.cat([adapted(images) for images in stream])


def test_classes_in_another_order():
    net, order = embedding_net(), torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(net)
    other[-1].weight.data, other[-1].bias.data = net[-1].weight.data[order], net[-1].bias.data[order]
    torch.testing.assert_close(run(other, SETTINGS, batches()), run(net, SETTINGS, batches())[:, order])


def test_without_weight_it_is_the_network_bit_for_bit():
    net, images = embedding_net(), batches()[0]
    expected = Source().wrap(copy.deepcopy(net))(images)
    for name in ("growth", "largest_weight"):
        assert torch.equal(run(net, {**SETTINGS, name: 0.0}, [images]), expected)
    adapted = DoTA(reset="never", **SETTINGS).wrap(net)
    first = adapted(images)
    adapted(images)
    adapted.reset()
    assert torch.equal(adapted(images), first)


def test_a_thousand_classes():
    net = embedding_net(1000)
    reference = Reference(net, SETTINGS)
    adapted = DoTA(reset="never", **SETTINGS).wrap(copy.deepcopy(net))
    for images in batches((3, 2)):
        torch.testing.assert_close(adapted(images), reference.step(images))


def test_in_float32():
    """Sums of squares minus products keep the covariance positive, and scores close to those of float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 48, bias=False), nn.Linear(48, 10)).eval()
    stream = [torch.randn(50, 3, 2, 2) for _ in range(20)]
    adapted = DoTA(reset="never").wrap(copy.deepcopy(net))
    exact = DoTA(reset="never").wrap(copy.deepcopy(net).double())
    for images in stream:
        logits, expected = adapted(images), exact(images.double())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3)


def test_scores_are_differences_of_densities():
    torch.manual_seed(0)
    features, means, root = (torch.randn(count, 4).double() for count in (5, 3, 4))
    covariance = root @ root.T
    densities = [torch.distributions.MultivariateNormal(mean, covariance).log_prob(features) for mean in means]
    scores = gaussian_scores(features, means, covariance)
    torch.testing.assert_close(scores - scores[:, :1], torch.stack(densities, dim=1) - densities[0][:, None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variance": 0.0}, "variance must be positive and finite"),
        ({"ridge": 1.0}, r"ridge must lie in \(0, 1\)"),
        ({"growth": -1.0}, "growth must be at least 0 and finite"),
        ({"largest_weight": math.inf}, "largest_weight must be at least 0 and finite"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DoTA(**settings)


def test_all_settings_are_in_the_protocol():
    protocol = DoTA(**SETTINGS).protocol()
    assert {name: protocol[name] for name in SETTINGS} == SETTINGS
