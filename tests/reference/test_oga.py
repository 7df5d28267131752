"""OGA against lists of features and loops, and what must not change its predictions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import embeddings
from support.embeddings import batches, run, softmax
from support.networks import embedding_net

from ttalight.adapters import OGA, Source
from ttalight.adapters.methods.oga import ridge_covariance

SETTINGS = {"size": 4, "weight": 0.3}


class Reference(embeddings.Reference):
    """For each class a list of entropies and features."""

    def __init__(self, net, settings):
        super().__init__(net, OGA(**settings))
        self.cache = [[] for _ in self.texts]

    def step(self, images):
        features, logits = self.read(images)
        for feature, row in zip(features, logits, strict=True):
            entropy = -math.fsum(p * math.log(p) for p in softmax(row) if p > 0)
            kept = self.cache[row.index(max(row))]
            kept.append((entropy, torch.tensor(feature, dtype=torch.float64)))
            kept.sort(key=lambda entry: entry[0])
            del kept[self.method.size :]
        means, inverse = self.means(), torch.linalg.inv(self.covariance())
        return torch.tensor(
            [
                [
                    logit + self.method.weight * (x @ inverse @ mean - mean @ inverse @ mean / 2).item()
                    for logit, mean in zip(row, means, strict=True)
                ]
                for row, x in zip(logits, torch.tensor(features, dtype=torch.float64), strict=True)
            ],
            dtype=torch.float64,
        )

    def means(self):
        return [
            sum(x for _, x in kept) / len(kept) if len(kept) > 1 else torch.tensor(text, dtype=torch.float64)
            for kept, text in zip(self.cache, self.texts, strict=True)
        ]

    def covariance(self):
        width = len(self.texts[0])
        identity = torch.eye(width).double()
        if max(map(len, self.cache)) <= 2:
            return 1.0001 * identity / width
        deviations = [x - mean for kept, mean in zip(self.cache, self.means(), strict=True) for _, x in kept]
        n = len(deviations)
        centre = sum(deviations) / n
        covariance = sum(torch.outer(x - centre, x - centre) for x in deviations) / (n - 1)
        if n <= 4 * width:
            covariance = ((n - 1) * covariance + covariance.trace() * identity) / width
        return covariance + 1e-4 * identity / width


@pytest.mark.parametrize(("classes", "size"), [(2, 4), (4, 2), (7, 4), (2, 20)])
def test_against_loops_with_a_resume_in_the_middle(classes, size):
    settings = {**SETTINGS, "size": size}
    reference = Reference(embedding_net(classes), settings)
    embeddings.check_against(reference, settings, batches())
    assert max(map(len, reference.cache)) >= min(size, 5)
    if size == 20:
        assert sum(map(len, reference.cache)) > 4 * 6


def test_invariances():
    embeddings.check_order_of_classes(OGA, SETTINGS)
    embeddings.check_settings(OGA, SETTINGS)


def test_a_reset_begins_again_bit_for_bit():
    adapted, stream = OGA(reset="never", **SETTINGS).wrap(embedding_net()), batches()
    first = [adapted(images) for images in stream]
    adapted.reset()
    assert all(torch.equal(adapted(images), expected) for images, expected in zip(stream, first, strict=True))


def test_a_thousand_classes():
    embeddings.check_against(Reference(embedding_net(1000), SETTINGS), SETTINGS, batches((3, 2)))


def test_without_weight_it_is_the_network_bit_for_bit():
    net, images = embedding_net(), batches()[0]
    expected = Source().wrap(copy.deepcopy(net))(images)
    assert torch.equal(run(OGA, {"weight": 0.0}, net, [images]), expected)


def test_empty_cache_sharpens_the_cosines():
    net, images = embedding_net(), batches()[0]
    expected = net(images)
    cosines = torch.nn.functional.normalize(net[:-1](images)) @ torch.nn.functional.normalize(net[-1].weight).T
    adapted = OGA(weight=0.5).wrap(net)
    moved = adapted(images, adapt=False) - expected
    torch.testing.assert_close(moved - moved[:, :1], 0.5 * 6 / 1.0001 * (cosines - cosines[:, :1]))


def test_images_that_coincide_stay_finite():
    images = batches()[0][:1].repeat(9, 1, 1, 1).float()
    assert run(OGA, {}, embedding_net(2).float(), [images, images]).isfinite().all()


def test_covariance_of_many():
    torch.manual_seed(0)
    vectors = torch.randn(90, 4).double()
    present = torch.arange(90) < 60
    torch.testing.assert_close(ridge_covariance(vectors, present), vectors[:60].T.cov())
    few = vectors[:16].T.cov()
    expected = (15 * few + few.trace() * torch.eye(4).double()) / 4
    torch.testing.assert_close(ridge_covariance(vectors, torch.arange(90) < 16), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"weight": -1.0}, "weight must be at least 0 and finite"),
        ({"norm": "ema"}, "norm must be 'source' or 'batch'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        OGA(**settings)
