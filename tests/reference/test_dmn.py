"""DMN against loops over images and lists of features, and what must not change its predictions."""

from __future__ import annotations

import math

import pytest
import torch
from support import embeddings
from support.embeddings import batches, dot, run, softmax, unit
from support.networks import embedding_net

from ttalight.adapters import DMN

SETTINGS = {"size": 3, "sharpness": 2.0, "weight": 0.4, "scale": 7.0}


class Reference(embeddings.Reference):
    """For each class a list of entropies and features."""

    def __init__(self, net, settings):
        super().__init__(net, DMN(**settings))
        self.memory = [[] for _ in self.texts]

    def image(self, feature, logits):
        method, first = self.method, softmax(logits)
        kept = self.memory[first.index(max(first))]
        kept.append((-math.fsum(p * math.log(p) for p in first if p > 0), feature))
        kept.sort(key=lambda entry: entry[0])
        del kept[method.size :]
        second = []
        for text, entries in zip(self.texts, self.memory, strict=True):
            vectors = [text, *(vector for _, vector in entries)]
            weights = [math.exp(-method.sharpness * (1 - dot(feature, vector))) for vector in vectors]
            mean = unit([dot(weights, column) for column in zip(*vectors, strict=True)])
            second.append(method.scale * dot(feature, mean))
        mixed = [p + method.weight * q for p, q in zip(first, softmax(second), strict=True)]
        return [math.log(p / (1 + method.weight)) for p in mixed]


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_against_loops_with_a_resume_in_the_middle(classes):
    reference = Reference(embedding_net(classes), SETTINGS)
    adapted = embeddings.check_against(reference, SETTINGS, batches())
    state = adapted.engine.method.method_state()
    for number, kept in enumerate(reference.memory):
        entropies = [entropy for entropy, _ in kept]
        assert state["entropies"][number, : len(kept)].tolist() == pytest.approx(entropies)
    assert max(map(len, reference.memory)) == 3


def test_invariances():
    embeddings.check_order_of_classes(DMN, SETTINGS)
    embeddings.check_any_batch_size(DMN, SETTINGS)
    embeddings.check_reset(DMN, SETTINGS)
    embeddings.check_settings(DMN, SETTINGS)


def test_batches_of_more_images_than_are_computed_together():
    net = embedding_net()
    stream = torch.cat([*batches(), *batches()]).flip(2)
    torch.testing.assert_close(run(DMN, SETTINGS, net, [stream]), run(DMN, SETTINGS, net, list(stream.split(7))))


def test_a_thousand_classes():
    embeddings.check_against(Reference(embedding_net(1000), SETTINGS), SETTINGS, batches((3, 2)))


def test_empty_memory_is_the_network():
    """Its logits are cosines times ``scale``, as those of the second classifier then are."""
    net, images = embedding_net(), batches()[0]
    net[-1].bias.data.zero_()
    net[-1].weight.data = 7 * torch.nn.functional.normalize(net[-1].weight.data)
    net.insert(2, Unit())
    adapted = DMN(**SETTINGS, reset="never").wrap(net)
    expected = net(images).log_softmax(1)
    torch.testing.assert_close(adapted(images, adapt=False), expected)
    adapted(images)
    assert not torch.allclose(adapted(images, adapt=False), expected)


class Unit(torch.nn.Module):
    def forward(self, features):
        return torch.nn.functional.normalize(features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"sharpness": -1.0}, "sharpness must be at least 0 and finite"),
        ({"weight": 0.0}, "weight must be positive and finite"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DMN(**settings)
