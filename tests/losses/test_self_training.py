"""Losses that a classifier's own predictions supervise, against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ttalight.losses import (
    entropy,
    generalized_cross_entropy,
    marginal_entropy,
    soft_likelihood_ratio,
    symmetric_cross_entropy,
)


@pytest.fixture
def logits():
    return 3 * torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_generalized_cross_entropy_between_its_limits(logits):
    p = [max(row) for row in logits.softmax(1).tolist()]
    assert generalized_cross_entropy(logits, 0.8).tolist() == pytest.approx([(1 - x**0.8) / 0.8 for x in p])
    torch.testing.assert_close(generalized_cross_entropy(logits, 1.0), 1 - logits.softmax(1).amax(1))
    near = generalized_cross_entropy(logits, 1e-6)
    torch.testing.assert_close(near, F.cross_entropy(logits, logits.argmax(1), reduction="none"), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"q must lie in \(0, 1\], got 0"):
        generalized_cross_entropy(logits, 0)


def test_soft_likelihood_ratio_is_written_out(logits):
    expected = []
    for row in logits.softmax(1).tolist():
        clipped = [min(p, 0.9) for p in row]
        expected.append(-sum(p * math.log(p / (1 - p)) for p in clipped))
    assert soft_likelihood_ratio(logits, clip=0.9).tolist() == pytest.approx(expected)


def test_soft_likelihood_ratio_is_finite_if_certain():
    logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    value = soft_likelihood_ratio(logits)
    value.sum().backward()
    assert value.item() == pytest.approx(-0.99 * math.log(99), rel=1e-5)
    assert torch.isfinite(logits.grad).all()


def test_symmetric_cross_entropy_sums_both_directions(logits):
    other = logits.flip(0) * 0.3
    both = (
        F.cross_entropy(other, logits.softmax(1), reduction="none"),
        F.cross_entropy(logits, other.softmax(1), reduction="none"),
    )
    torch.testing.assert_close(symmetric_cross_entropy(logits, other, 0.25), 0.25 * both[0] + 0.75 * both[1])
    torch.testing.assert_close(symmetric_cross_entropy(logits, logits), entropy(logits))


def test_marginal_entropy_of_mean_probability(logits):
    views = torch.stack([logits, logits.flip(0), logits * 0.1], 1)
    expected = []
    for image in views.softmax(2).tolist():
        mean = [sum(view[c] for view in image) / 3 for c in range(4)]
        expected.append(-sum(p * math.log(p) for p in mean))
    assert marginal_entropy(views).tolist() == pytest.approx(expected)
    assert marginal_entropy(views[2]).item() == pytest.approx(expected[2])


@pytest.mark.parametrize(
    "loss",
    [
        generalized_cross_entropy,
        soft_likelihood_ratio,
        lambda x: symmetric_cross_entropy(x, x.flip(0)),
        marginal_entropy,
    ],
)
def test_gradients_and_precision(loss, logits):
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))
    assert loss(logits.detach().bfloat16()).dtype == torch.float32
