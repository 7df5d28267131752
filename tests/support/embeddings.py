"""Streams for methods that read features, and what all of these methods have in common."""

from __future__ import annotations

import copy
import math

import torch
from support.networks import embedding_net
from torch import nn

from ttalight.adapters import AdaptedNetwork, Adapter


def batches(sizes=(9, 4, 1, 12, 3)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randn(sum(sizes), 3, 2, 2, generator=generator, dtype=torch.float64).split(list(sizes)))


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(value**2 for value in vector))
    return [value / length if length else 0.0 for value in vector]


def dot(first: list[float], second: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(first, second, strict=True))


def softmax(logits: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(logits)) for value in logits]
    return [value / math.fsum(exponentials) for value in exponentials]


class Reference:
    """Reads features and logits of a network, and predicts them by ``image``, one after another."""

    def __init__(self, net: nn.Sequential, method: Adapter) -> None:
        self.net, self.method = net, method
        self.texts = [unit(row) for row in net[-1].weight.tolist()]

    def read(self, images: torch.Tensor) -> tuple[list[list[float]], list[list[float]]]:
        with torch.no_grad():
            features = self.net[:-1](images)
            return [unit(feature) for feature in features.tolist()], self.net[-1](features).tolist()

    def step(self, images: torch.Tensor) -> torch.Tensor:
        rows = [self.image(*pair) for pair in zip(*self.read(images), strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def image(self, feature: list[float], logits: list[float]) -> list[float]:
        raise NotImplementedError


def run(method: type[Adapter], settings: dict, net: nn.Module, stream: list[torch.Tensor]) -> torch.Tensor:
    adapted = method(reset="never", **settings).wrap(copy.deepcopy(net))
    return torch.cat([adapted(images) for images in stream])


def check_against(reference: Reference, settings: dict, stream: list[torch.Tensor]) -> AdaptedNetwork:
    """Compare the predictions of a stream, with a resume in the middle; return the network as it is at the end."""
    method, net = type(reference.method), reference.net
    adapted = method(reset="never", **settings).wrap(copy.deepcopy(net))
    for number, images in enumerate(stream):
        if number == 2:
            state = adapted.state_dict()
            adapted = method(reset="never", **settings).wrap(copy.deepcopy(net))
            adapted.load_state_dict(state)
        torch.testing.assert_close(adapted(images), reference.step(images))
    return adapted


def check_order_of_classes(method: type[Adapter], settings: dict) -> None:
    """Classes in another order are predicted in that order."""
    net, order = embedding_net(), torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(net)
    other[-1].weight.data, other[-1].bias.data = net[-1].weight.data[order], net[-1].bias.data[order]
    expected = run(method, settings, net, batches())[:, order]
    torch.testing.assert_close(run(method, settings, other, batches()), expected)


def check_any_batch_size(method: type[Adapter], settings: dict) -> None:
    """The size of batches changes nothing."""
    net, stream = embedding_net(), torch.cat(batches())
    whole = run(method, settings, net, [stream])
    for size in (1, 4, 10):
        torch.testing.assert_close(run(method, settings, net, list(stream.split(size))), whole)


def check_reset(method: type[Adapter], settings: dict) -> None:
    """A reset begins again bit for bit, and the stream before it had an effect."""
    adapted, images = method(reset="never", **settings).wrap(embedding_net()), batches()[0]
    first = adapted(images)
    assert not torch.equal(adapted(images), first)
    adapted.reset()
    assert torch.equal(adapted(images), first)


def check_settings(method: type[Adapter], settings: dict) -> None:
    """All settings are in the protocol."""
    protocol = method(**settings).protocol()
    assert {name: protocol[name] for name in settings} == settings
