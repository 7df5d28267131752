"""Hybrid targets and alignment losses against sums written out for one sample."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from ttalight.losses.class_alignment import class_alignment, hybrid_targets
from ttalight.losses.similarity import unit_vectors

C, D, B = 6, 5, 7


@pytest.fixture
def draws():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def features(draws):
    return unit_vectors(torch.randn(B, D, dtype=torch.float64, generator=draws))


@pytest.fixture
def rows(draws):
    return unit_vectors(torch.randn(C, D, dtype=torch.float64, generator=draws))


@pytest.fixture
def logits(draws):
    return torch.randn(B, C, dtype=torch.float64, generator=draws)


def target_of(similarities, logits, top_k, share):
    """The target of one sample, by plain numbers."""
    total = sum(map(math.exp, logits))
    p = [math.exp(value) / total for value in logits]
    chosen = sorted(range(len(p)), key=lambda k: -p[k])[:top_k]
    distances = [1 - similarities[k] for k in chosen]
    spread = statistics.pstdev(distances) + 1e-8
    geometric = [math.exp(-(d - statistics.fmean(distances)) / spread) for d in distances]
    target = [0.0] * len(p)
    for k, g in zip(chosen, geometric, strict=True):
        target[k] = (1 - share) * g / sum(geometric) + share * p[k] / sum(p[j] for j in chosen)
    return target


@pytest.mark.parametrize(("top_k", "share"), [(3, 0.3), (3, 0.0), (2, 1.0), (C, 0.3), (10, 0.5), (1, 0.3)])
def test_targets_are_written_out(features, rows, logits, top_k, share):
    similarities = features @ rows.T
    targets = hybrid_targets(similarities, logits, top_k, share)
    for own, s, values in zip(targets.tolist(), similarities.tolist(), logits.tolist(), strict=True):
        assert own == pytest.approx(target_of(s, values, top_k, share), abs=1e-12)
    torch.testing.assert_close(targets.sum(1), torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_likeliest_classes_are_targets(share):
    logits = torch.tensor([[200.0, 0.0, -1.0, -2.0, -300.0]])  # float32 probabilities of all but the first are 0
    targets = hybrid_targets(torch.linspace(-1, 1, 5)[None], logits, top_k=3, share=share)
    assert (targets > 0).tolist() == [[True, True, True, False, False]]
    assert targets.sum().item() == pytest.approx(1)


def test_losses_are_written_out(features, rows, logits):
    similarities = features @ rows.T
    targets = hybrid_targets(similarities, logits, top_k=3)
    own = class_alignment(similarities, targets)
    for i in range(B):
        s, q = similarities[i].tolist(), targets[i].tolist()
        expected = -math.log(sum(q[k] * math.exp(s[k]) for k in range(C)) / sum(math.exp(s[k]) for k in range(C)))
        assert own[i].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_flow_to_features_and_predictions(rows, logits, features, top_k):
    def loss(features, logits):
        similarities = features @ rows.T
        return class_alignment(similarities, hybrid_targets(similarities, logits, top_k))

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), logits.requires_grad_()))


def test_a_feature_on_its_row_has_a_finite_gradient(rows, logits):
    features = rows[:1].clone().requires_grad_()
    logits = logits[:1].clone()
    logits[0, 0] = 9.0
    similarities = features @ rows.T
    targets = hybrid_targets(similarities, logits, top_k=1)
    (gradient,) = torch.autograd.grad(class_alignment(similarities, targets).sum(), features)
    assert gradient.isfinite().all()


def test_large_similarities_do_not_overflow(rows, features, logits):
    similarities = 100 * features.float() @ rows.float().T
    targets = hybrid_targets(similarities / 100, logits.float(), top_k=2)
    assert class_alignment(similarities, targets).isfinite().all()
