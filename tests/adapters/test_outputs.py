"""Methods return logits: metrics that take their softmax say what a reader expects."""

from __future__ import annotations

import copy

import pytest
import torch

from ttalight.adapters import LAME, PTBN, ROID
from ttalight.adapters.methods.roid import smoothed_prior
from ttalight.metrics import StreamingClassification


@pytest.fixture
def images():
    """Images of two kinds in [0, 1], so that classes are not equally frequent."""
    generator = torch.Generator().manual_seed(1)
    images = 0.2 * torch.rand(12, 3, 16, 16, generator=generator, dtype=torch.float64)
    images[:8, 0] += 0.7
    return images


def values_of(probabilities, labels, bins=15):
    """NLL and ECE by loops over samples."""
    nll, sums = 0.0, [[0.0, 0] for _ in range(bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        nll -= torch.tensor(row[label], dtype=torch.float64).log().item() / len(labels)
        confidence = max(row)
        at = next(index for index in range(bins) if confidence <= (index + 1) / bins)
        sums[at][0] += confidence
        sums[at][1] += row.index(confidence) == label
    return {"nll": nll, "ece": sum(abs(confidence - correct) for confidence, correct in sums) / len(labels)}


def check(outputs, probabilities):
    labels = torch.arange(len(outputs)) % outputs.shape[1]
    metric = StreamingClassification(outputs.shape[1])
    metric.update(outputs, labels)
    found = metric.compute()
    expected = values_of(probabilities, labels)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_lame_returns_log_probabilities(make_net, images):
    net = make_net()
    adapted = LAME().wrap(net)
    outputs = adapted(images)
    torch.testing.assert_close(outputs.exp().sum(1), torch.ones(12, dtype=torch.float64))
    check(outputs, outputs.exp())


@pytest.mark.parametrize("correction", ["log", "none"])
def test_roid_returns_the_corrected_posterior(make_net, images, correction):
    net = make_net()
    net[9].weight.data *= 3
    posterior = PTBN().wrap(copy.deepcopy(net))(images)
    prior = smoothed_prior(posterior) if correction == "log" else torch.ones(4, dtype=torch.float64)
    assert correction == "none" or prior.amax() > 1.5 * prior.amin()
    corrected = posterior.softmax(1) * prior  # Bayes' rule, where all classes were as frequent in the source
    corrected = corrected / corrected.sum(1, keepdim=True)
    check(ROID(prior_correction=correction, lr=0.0).wrap(net)(images), corrected)
