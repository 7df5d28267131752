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


def target_of(similarities, logits, top_k, share, metric):
    """The target of one sample, by plain numbers."""
    total = sum(map(math.exp, logits))
    p = [math.exp(value) / total for value in logits]
    chosen = sorted(range(len(p)), key=lambda k: -p[k])[:top_k]
    distances = [1 - similarities[k] if metric == "cosine" else math.sqrt(2 - 2 * similarities[k]) for k in chosen]
    spread = statistics.pstdev(distances) + 1e-8
    geometric = [math.exp(-(d - statistics.fmean(distances)) / spread) for d in distances]
    target = [0.0] * len(p)
    for k, g in zip(chosen, geometric, strict=True):
        target[k] = (1 - share) * g / sum(geometric) + share * p[k] / sum(p[j] for j in chosen)
    return target


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("top_k", "share"), [(3, 0.3), (3, 0.0), (2, 1.0), (C, 0.3), (10, 0.5), (1, 0.3)])
def test_targets_are_written_out(features, rows, logits, metric, top_k, share):
    similarities = features @ rows.T
    targets = hybrid_targets(similarities, logits, top_k, share, metric)
    for own, s, values in zip(targets.tolist(), similarities.tolist(), logits.tolist(), strict=True):
        assert own == pytest.approx(target_of(s, values, top_k, share, metric), abs=1e-12)
    torch.testing.assert_close(targets.sum(1), torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_likeliest_classes_are_targets_however_small(share):
    logits = torch.tensor([[200.0, 0.0, -1.0, -2.0, -300.0]])  # float32 probabilities of all but the first are 0
    targets = hybrid_targets(torch.linspace(-1, 1, 5)[None], logits, top_k=3, share=share)
    assert (targets > 0).tolist() == [[True, True, True, False, False]]
    assert targets.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["infonce", "l2", "triplet", "hinge"])
def test_losses_are_written_out(features, rows, logits, kind):
    similarities = features @ rows.T
    targets = hybrid_targets(similarities, logits, top_k=3)
    own = class_alignment(features, rows, similarities, targets, kind, temperature=0.7, margin=1.5)
    for i in range(B):
        s, q = similarities[i].tolist(), targets[i].tolist()
        goal = sum(q[k] * rows[k] for k in range(C))
        goal = goal / goal.norm()
        outside = max(s[k] for k in range(C) if q[k] == 0)
        expected = {
            "infonce": -math.log(
                sum(q[k] * math.exp(s[k] / 0.7) for k in range(C)) / sum(math.exp(s[k] / 0.7) for k in range(C))
            ),
            "l2": float((features[i] - goal).square().sum()),
            "triplet": max(0.0, 1.5 - float(features[i] @ goal) + outside),
            "hinge": max(0.0, 1.5 - sum(q[k] * s[k] for k in range(C)) + outside),
        }[kind]
        assert own[i].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["infonce", "l2", "triplet", "hinge"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_flow_to_features_and_predictions(rows, logits, features, kind, top_k):
    def loss(features, logits):
        similarities = features @ rows.T
        targets = hybrid_targets(similarities, logits, top_k, metric="euclidean")
        return class_alignment(features, rows, similarities, targets, kind, margin=1.5)

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), logits.requires_grad_()))


def test_a_feature_on_its_row_has_a_finite_gradient(rows, logits):
    features = rows[:1].clone().requires_grad_()
    logits = logits[:1].clone()
    logits[0, 0] = 9.0
    similarities = features @ rows.T
    for metric in ("cosine", "euclidean"):
        targets = hybrid_targets(similarities, logits, top_k=1, metric=metric)
        (gradient,) = torch.autograd.grad(
            class_alignment(features, rows, similarities, targets).sum(), features, retain_graph=True
        )
        assert gradient.isfinite().all()


def test_a_small_temperature_does_not_overflow(rows, features, logits):
    features, rows = features.float(), rows.float()
    similarities = features @ rows.T
    targets = hybrid_targets(similarities, logits.float(), top_k=2)
    own = class_alignment(features, rows, similarities, targets, temperature=0.01)
    assert own.isfinite().all()
