"""Classes of probability 0, masked ones among them: losses are finite, and those of the classes that are left."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.adapters.methods.roid import certainty_diversity_weights, smoothed_prior
from ttalight.adapters.methods.shot import confident_cross_entropy, information_maximization
from ttalight.adapters.methods.tipi import divergence
from ttalight.losses import (
    class_alignment,
    clustering_loss,
    entropy,
    entropy_slopes,
    generalized_cross_entropy,
    hybrid_targets,
    marginal_entropy,
    mutual_divergence,
    soft_likelihood_ratio,
    structural_alignment,
    symmetric_cross_entropy,
)

#: Functions of one or two predictions (B, C).
LOSSES = {
    "entropy": entropy,
    "generalized_cross_entropy": generalized_cross_entropy,
    "soft_likelihood_ratio": soft_likelihood_ratio,
    "marginal_entropy": marginal_entropy,
    "clustering_loss": clustering_loss,
    "confident_cross_entropy": lambda logits: confident_cross_entropy(logits, 0.3),
    "information_maximization": information_maximization,
    "symmetric_cross_entropy": symmetric_cross_entropy,
    "divergence": divergence,
    "mutual_divergence": mutual_divergence,
    "slopes": lambda logits: entropy_slopes(logits)[:, :3],
    "alignment of slopes": lambda logits: structural_alignment(entropy_slopes(logits)[:, :3], torch.eye(4)[:, :3]),
}
BINARY = ("symmetric_cross_entropy", "divergence", "mutual_divergence")
B, C, LEFT = 4, 6, 4


def values_and_gradients(name, *logits):
    """The loss of each sample times a weight above 1, and its gradients."""
    leaves = [values.clone().requires_grad_() for values in logits[: 2 if name in BINARY else 1]]
    values = LOSSES[name](*leaves)
    return values.detach(), torch.autograd.grad((100 * values).sum(), leaves)


@pytest.fixture
def predictions():
    """Two predictions whose last classes are masked."""
    draws = torch.Generator().manual_seed(0)
    first, second = 3 * torch.randn(2, B, C, generator=draws)
    first[:, LEFT:], second[:, LEFT:] = -torch.inf, -torch.inf
    return first, second


@pytest.mark.parametrize("name", LOSSES)
def test_masked_classes_are_as_classes_cut_off(name, predictions):
    masked, gradients = values_and_gradients(name, *predictions)
    cut, expected = values_and_gradients(name, *(logits[:, :LEFT] for logits in predictions))
    torch.testing.assert_close(masked, cut)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient[:, :LEFT], other)
        assert not gradient[:, LEFT:].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 1e4), (torch.float64, 1e4)]
)
def test_one_hot_predictions_have_finite_losses(name, dtype, size):
    logits = size * torch.eye(B, C, dtype=dtype)
    values, gradients = values_and_gradients(name, logits, -logits if size < 1e5 else logits)
    assert torch.isfinite(values).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_each_row_may_mask_other_classes(predictions):
    logits = predictions[0].clone()
    logits[0, 0] = -torch.inf
    for name in ("entropy", "generalized_cross_entropy", "soft_likelihood_ratio"):
        values, (gradient,) = values_and_gradients(name, logits)
        expected, (other,) = values_and_gradients(name, logits[:1, 1:LEFT])
        torch.testing.assert_close(values[:1], expected)
        torch.testing.assert_close(gradient[:1, 1:LEFT], other)


def test_class_masked_in_one_view():
    logits = torch.zeros(2, 3)
    logits[0, 2] = -torch.inf
    p = torch.tensor([5 / 12, 5 / 12, 1 / 6])
    torch.testing.assert_close(marginal_entropy(logits), -(p * p.log()).sum())


def test_impossible_target_diverges():
    possible, impossible = torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])
    assert divergence(possible, impossible).item() == math.inf
    torch.testing.assert_close(divergence(impossible, possible), torch.tensor([math.log(2)]))


def test_clip_near_one_gives_a_finite_ratio():
    assert torch.isfinite(soft_likelihood_ratio(torch.tensor([[1e4, 0.0]]), clip=1 - 1e-9)).all()


@pytest.mark.parametrize("top_k", [2, 10])
def test_alignment_without_masked_classes(top_k, predictions):
    draws = torch.Generator().manual_seed(1)
    features, rows = (torch.nn.functional.normalize(torch.randn(n, 3, generator=draws), dim=1) for n in (B, C))
    results = []
    for count in (C, LEFT):
        logits, vectors = predictions[0][:, :count].clone().requires_grad_(), features.clone().requires_grad_()
        similarities = (vectors @ rows[:count].T).masked_fill(logits == -torch.inf, -torch.inf)
        targets = hybrid_targets(similarities, logits, top_k, 0.3)
        losses = class_alignment(similarities, targets)
        gradients = torch.autograd.grad(losses.sum(), (logits, vectors))
        results.append((losses, targets[:, :LEFT], gradients[0][:, :LEFT], gradients[1]))
    for masked, cut in zip(*results, strict=True):
        torch.testing.assert_close(masked, cut)
    targets = hybrid_targets(torch.zeros(B, C), predictions[0])
    assert not targets[:, LEFT:].any()


def test_prior_and_weights_ignore_masked_classes(predictions):
    prior, expected = smoothed_prior(predictions[0]), smoothed_prior(predictions[0][:, :LEFT])
    torch.testing.assert_close(prior[:LEFT], expected)
    uniform = torch.tensor([1 / LEFT] * LEFT + [0.0] * (C - LEFT))
    probabilities = predictions[0].softmax(1)
    weights = certainty_diversity_weights(probabilities, uniform, 1 / 3)
    torch.testing.assert_close(weights, certainty_diversity_weights(probabilities[:, :LEFT], uniform[:LEFT], 1 / 3))
