"""StatA against loops over numbers, and what must not change its predictions."""

from __future__ import annotations

import math

import pytest
import torch
from support import embeddings
from support.embeddings import batches, dot, run, softmax, unit
from support.networks import embedding_net

from ttalight.adapters import StatA
from ttalight.adapters.methods.stata import anchored_gaussians, diagonal_scores, shared_variance

SETTINGS = {"anchor": 1.5, "neighbors": 2, "link_weight": 3.0, "iterations": 4, "soft": False}


class Reference(embeddings.Reference):
    """Each batch on its own, number by number."""

    def __init__(self, net, settings):
        super().__init__(net, StatA(**settings))

    def step(self, images):
        features, logits = self.read(images)
        method, texts = self.method, self.texts
        count, classes, width = len(features), range(len(texts)), range(len(texts[0]))
        links = [[0.0] * count for _ in features]
        for i, feature in enumerate(features):
            others = sorted(((dot(feature, features[j]), j) for j in range(count) if j != i), reverse=True)
            for cosine, j in others[: method.neighbors]:
                links[i][j] += cosine
                links[j][i] += cosine
        first = [softmax(row) for row in logits]
        labels = first
        anchor = [
            math.fsum(z[c] * (f[d] - texts[c][d]) ** 2 for f, z in zip(features, first, strict=True) for c in classes)
            / count
            for d in width
        ]
        means, variances = texts, [anchor for _ in classes]
        for update in range(method.iterations + 1):
            scores = [
                [-math.fsum((f[d] - means[c][d]) ** 2 / variances[c][d] for d in width) / 2 for c in classes]
                for f in features
            ]
            for _ in range(5):
                labels = [
                    softmax(
                        [
                            math.log(first[i][c])
                            + scores[i][c] / 50
                            + method.link_weight
                            / (2 * method.neighbors)
                            * math.fsum(links[i][j] * labels[j][c] for j in range(count))
                            for c in classes
                        ]
                    )
                    for i in range(count)
                ]
            if update < method.iterations:
                pairs = [self.gaussian(c, features, labels, anchor) for c in classes]
                means, variances = ([pair[number] for pair in pairs] for number in range(2))
        return torch.tensor([[math.log(z) for z in row] for row in labels], dtype=torch.float64)

    def gaussian(self, c, features, labels, anchor):
        text, column = self.texts[c], [row[c] for row in labels]
        votes = math.fsum(column) if self.method.soft else sum(row[c] == max(row) for row in labels)
        beta = votes / (self.method.anchor + votes)
        centre = unit([dot(column, dimension) for dimension in zip(*features, strict=True)])
        mean = unit([beta * m + (1 - beta) * t for m, t in zip(centre, text, strict=True)])
        variance = [
            beta * math.fsum(z * (f[d] - mean[d]) ** 2 for z, f in zip(column, features, strict=True)) / sum(column)
            + (1 - beta) * (anchor[d] + (text[d] - mean[d]) ** 2)
            for d in range(len(text))
        ]
        return mean, variance


@pytest.mark.parametrize(("classes", "soft"), [(2, False), (4, True), (7, False)])
def test_against_loops(classes, soft):
    settings = {**SETTINGS, "soft": soft}
    embeddings.check_against(Reference(embedding_net(classes, scale=0.5), settings), settings, batches((9, 4, 2, 1)))


def test_invariances():
    embeddings.check_order_of_classes(StatA, SETTINGS)
    embeddings.check_settings(StatA, SETTINGS)


def test_order_of_images_and_batches_on_their_own():
    net, images = embedding_net(), batches()[0]
    once = run(StatA, SETTINGS, net, [images])
    torch.testing.assert_close(run(StatA, SETTINGS, net, [images.flip(0)]).flip(0), once)
    assert torch.equal(run(StatA, SETTINGS, net, [batches()[3], images])[-9:], once)


def test_a_thousand_classes():
    settings = {**SETTINGS, "iterations": 1}
    net = embedding_net(1000, scale=0.2)
    embeddings.check_against(Reference(net, settings), settings, batches((4,)))


def test_in_float32():
    net, images = embedding_net(scale=0.5), batches()[0]
    expected = run(StatA, {}, net, [images])
    torch.testing.assert_close(run(StatA, {}, net.float(), [images.float()]).double(), expected, rtol=1e-3, atol=1e-3)


def test_scores_are_differences_of_densities():
    torch.manual_seed(0)
    features, means, variance = torch.randn(5, 4).double(), torch.randn(3, 4).double(), torch.rand(4).double()
    densities = [torch.distributions.Normal(mean, variance.sqrt()).log_prob(features).sum(1) for mean in means]
    scores = diagonal_scores(features, means, variance.expand(3, 4))
    torch.testing.assert_close(scores - scores[:, :1], torch.stack(densities, dim=1) - densities[0][:, None])


def test_classes_without_images_keep_their_text():
    torch.manual_seed(0)
    features, texts = (torch.nn.functional.normalize(torch.randn(count, 4).double()) for count in (5, 3))
    labels = torch.eye(3).double()[[0, 0, 1, 1, 0]]
    variance = shared_variance(features, texts, labels)
    torch.testing.assert_close(variance, (features - texts[[0, 0, 1, 1, 0]]).square().mean(0))
    counts = labels.sum(0)
    means, variances = anchored_gaussians(features, labels, texts, variance, counts / (1 + counts))
    torch.testing.assert_close(means[2], texts[2])
    torch.testing.assert_close(variances[2], variance)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_that_coincide_stay_finite(count):
    images = batches()[0][:1].repeat(count, 1, 1, 1).float()
    assert run(StatA, {}, embedding_net(2).float(), [images]).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": 0.0}, "anchor must be positive and finite"),
        ({"link_weight": -1.0}, "link_weight must be at least 0 and finite"),
        ({"neighbors": 0}, "neighbors and iterations must be at least 1, got 0 and 10"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        StatA(**settings)
