"""ECALP against a graph of lists and loops, and what must not change its predictions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import embeddings
from support.embeddings import batches, dot, unit
from support.networks import embedding_net

from ttalight.adapters import ECALP
from ttalight.adapters.methods.ecalp import propagated_labels

SETTINGS = {
    "memory": 7, "text_neighbors": 2, "image_neighbors": 3, "sharpness": 3.0, "iterations": 3, "mixing": 0.9,
    "kept": 0.3, "scale": 50.0,
}  # fmt: skip


class Reference(embeddings.Reference):
    """The last images, their nearest nodes, and a dict of weights for all pairs of nodes."""

    def __init__(self, net, settings):
        super().__init__(net, ECALP(**settings))
        columns = list(zip(*self.texts, strict=True))
        means = [math.fsum(column) / len(column) for column in columns]
        self.channels = [
            math.fsum((value - mean) ** 2 for value in column) for column, mean in zip(columns, means, strict=True)
        ]
        self.images, self.kept = [], []

    def similarity(self, older, newer):
        weighted = unit([value * channel for value, channel in zip(older, self.channels, strict=True)])
        return max(0.0, dot(weighted, newer))

    def edges(self):
        """Return weights between nodes: classes first, then images."""
        method, classes, edges = self.method, len(self.texts), {}
        for number, image in enumerate(self.images):
            pairs = [
                (self.similarity(*((image, other) if number <= place else (other, image))), classes + place)
                for place, other in enumerate(self.images)
            ]
            texts = [(max(0.0, dot(image, text)), place) for place, text in enumerate(self.texts)]
            nearest = sorted(pairs, reverse=True)[: method.image_neighbors]
            for similarity, place in nearest + sorted(texts, reverse=True)[: method.text_neighbors]:
                weight = similarity**method.sharpness
                for pair in ((classes + number, place), (place, classes + number)):
                    edges[pair] = edges.get(pair, 0.0) + weight
        return edges

    def image(self, feature, logits):
        method, classes = self.method, len(self.texts)
        self.images, self.kept = [*self.images, feature], [*self.kept, [0.0] * classes]
        self.images, self.kept = self.images[-method.memory :], self.kept[-method.memory :]
        edges = self.edges()
        degrees = [0.0] * (classes + len(self.images))
        for (start, _), weight in edges.items():
            degrees[start] += weight
        roots = [math.sqrt(degree) + 1e-6 for degree in degrees]
        identity = [[float(one == other) for other in range(classes)] for one in range(classes)]
        labels = self.kept
        for _ in range(method.iterations):
            nodes, following = identity + labels, []
            for number, kept in enumerate(self.kept):
                row = [(1 - method.mixing) * value for value in kept]
                for (start, end), weight in edges.items():
                    if start == classes + number:
                        for c in range(classes):
                            row[c] += method.mixing * weight / roots[start] / roots[end] * nodes[end][c]
                following.append(row)
            labels = following
        self.kept = [[method.kept * value * (value == max(row)) for value in row] for row in labels]
        return [method.scale * value for value in labels[-1]]


@pytest.mark.parametrize("classes", [2, 4])
def test_against_loops_with_a_resume_in_the_middle(classes):
    reference = Reference(embedding_net(classes), SETTINGS)
    adapted = embeddings.check_against(reference, SETTINGS, batches((9, 4, 1, 3)))
    state = adapted.engine.method.method_state()
    kept = torch.tensor(reference.kept, dtype=torch.float64).max(1)
    assert state["seen"] == 17
    slots = [(number + 17) % SETTINGS["memory"] for number in range(SETTINGS["memory"])]
    torch.testing.assert_close(state["confidences"][slots], kept.values)
    assert state["labels"][slots].tolist() == kept.indices.tolist()


def test_invariances():
    embeddings.check_order_of_classes(ECALP, SETTINGS)
    embeddings.check_any_batch_size(ECALP, SETTINGS)
    embeddings.check_reset(ECALP, SETTINGS)
    embeddings.check_settings(ECALP, SETTINGS)


def test_a_thousand_classes():
    settings = {**SETTINGS, "iterations": 2}
    embeddings.check_against(Reference(embedding_net(1000), settings), settings, batches((2, 1)))


def test_first_image_has_the_class_of_the_network():
    """Its only links are those with its texts, so its label is the root of the share of each."""
    net = embedding_net(7)
    net[-1].bias.data.zero_()
    net[-1].weight.data = torch.nn.functional.normalize(net[-1].weight.data)
    images = torch.cat(batches())
    predicted = ECALP(memory=5).wrap(copy.deepcopy(net))(images, adapt=False)
    assert torch.equal(predicted.argmax(1), net(images).argmax(1))


def test_labels_that_do_not_move_are_the_solution():
    """With many iterations they solve Y = a (W Y + T) + (1 - a) Y0."""
    torch.manual_seed(0)
    images, texts, labels = torch.rand(5, 5).double(), torch.rand(5, 3).double(), torch.rand(5, 3).double()
    links = images + images.T
    roots = (links.sum(1) + texts.sum(1)).sqrt() + 1e-6
    system = torch.eye(5) - 0.5 * links / roots[:, None] / roots
    sources = 0.5 * texts / roots[:, None] / (texts.sum(0).sqrt() + 1e-6) + 0.5 * labels
    expected = torch.linalg.solve(system, sources)
    torch.testing.assert_close(propagated_labels(images, texts, labels, 0.5, 200), expected)


def test_memory_of_one_image():
    net = embedding_net()
    stream = torch.cat(batches())
    adapted = ECALP(memory=1, kept=0.0, reset="never").wrap(copy.deepcopy(net))
    torch.testing.assert_close(adapted(stream), adapted(stream, adapt=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 0}, "memory must be at least 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"sharpness": 0.0}, "sharpness must be positive and finite"),
        ({"mixing": 1.1}, r"mixing must lie in \[0, 1\]"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        ECALP(**settings)
