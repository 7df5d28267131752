"""BCA against loops over numbers, and what must not change its predictions."""

from __future__ import annotations

import math

import pytest
import torch
from support import embeddings
from support.embeddings import batches, dot, softmax, unit
from support.networks import embedding_net

from ttalight.adapters import BCA

SETTINGS = {
    "mean_threshold": 0.6, "mean_count": 3.0, "prior_threshold": 0.8, "prior_count": 2.0, "scale": 5.0,
}  # fmt: skip


class Reference(embeddings.Reference):
    """Means and rows of probabilities as lists."""

    def __init__(self, net, settings):
        super().__init__(net, BCA(**settings))
        self.means = list(self.texts)
        classes = range(len(self.texts))
        self.prior = [[float(row == column) for column in classes] for row in classes]
        self.counts = [[self.method.mean_count, self.method.prior_count] for _ in classes]

    def image(self, feature, logits):
        method = self.method
        near = softmax(
            [
                logit + method.scale * (dot(feature, mean) - dot(feature, text))
                for logit, mean, text in zip(logits, self.means, self.texts, strict=True)
            ]
        )
        probabilities = [dot(near, column) for column in zip(*self.prior, strict=True)]
        c = probabilities.index(max(probabilities))
        if probabilities[c] > method.mean_threshold:
            n = self.counts[c][0]
            self.means[c] = unit([n * mean + value for mean, value in zip(self.means[c], feature, strict=True)])
            self.counts[c][0] += 1
        if probabilities[c] > method.prior_threshold:
            n = self.counts[c][1]
            self.prior[c] = [(n * row + p) / (n + 1) for row, p in zip(self.prior[c], probabilities, strict=True)]
            self.counts[c][1] += 1
        return [math.log(value) for value in probabilities]


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_against_loops_with_a_resume_in_the_middle(classes):
    reference = Reference(embedding_net(classes), SETTINGS)
    adapted = embeddings.check_against(reference, SETTINGS, batches())
    state, exact = adapted.engine.method.method_state(), torch.float64
    torch.testing.assert_close(state["means"], torch.tensor(reference.means, dtype=exact))
    torch.testing.assert_close(state["prior"], torch.tensor(reference.prior, dtype=exact))
    counts = torch.stack([state["mean_counts"], state["prior_counts"]], dim=1)
    assert counts.tolist() == reference.counts
    moved = counts.sum(0) - classes * torch.tensor([3.0, 2.0], dtype=exact)
    assert moved[1] > 0
    assert classes == 2 or 29 > moved[0] > moved[1]


def test_invariances():
    embeddings.check_order_of_classes(BCA, SETTINGS)
    embeddings.check_any_batch_size(BCA, SETTINGS)
    embeddings.check_reset(BCA, SETTINGS)
    embeddings.check_settings(BCA, SETTINGS)


def test_a_thousand_classes():
    settings = {**SETTINGS, "mean_threshold": 0.0}
    embeddings.check_against(Reference(embedding_net(1000), settings), settings, batches((3, 2)))


def test_before_the_first_image_it_is_the_network():
    net, images = embedding_net(), batches()[0]
    expected = net(images).log_softmax(1)
    adapted = BCA(reset="never").wrap(net)
    torch.testing.assert_close(adapted(images, adapt=False), expected)
    unmoved = BCA(mean_threshold=1.0, prior_threshold=1.0, reset="never").wrap(embedding_net())
    torch.testing.assert_close(unmoved(images), expected)


def test_probabilities_stay_probabilities():
    net = embedding_net(3).float()
    images = torch.randn(500, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    adapted = BCA(reset="never").wrap(net)
    torch.testing.assert_close(adapted(images).exp().sum(1), torch.ones(500))
    torch.testing.assert_close(adapted.engine.method.method_state()["prior"].sum(1), torch.ones(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean_threshold": -0.1}, r"mean_threshold must lie in \[0, 1\]"),
        ({"prior_count": 0.0}, "prior_count must be positive and finite"),
        ({"scale": math.inf}, "scale must be positive and finite"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        BCA(**settings)
