"""consistency_loss against a reference of loops, its closed forms and its target without a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import consistency_loss


def slow(logits, temperature):
    views, batch, classes = logits.shape
    p = [[[math.exp(v) for v in row] for row in view] for view in logits.tolist()]
    p = [[[v / sum(row) for v in row] for row in view] for view in p]
    total, marginal = 0.0, [0.0] * classes
    for i in range(batch):
        mean = [sum(p[v][i][k] for v in range(views)) / views for k in range(classes)]
        sharp = [m ** (1 / temperature) for m in mean]
        for v in range(views):
            total -= sum(s / sum(sharp) * math.log(p[v][i][k]) for k, s in enumerate(sharp)) / (views * batch)
        marginal = [m + mean[k] / batch for k, m in enumerate(marginal)]
    return total + sum(m * math.log(m) for m in marginal)


@pytest.fixture
def logits():
    return torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0])
def test_against_loops(logits, temperature):
    assert consistency_loss(logits, temperature).item() == pytest.approx(slow(logits, temperature), rel=1e-12)


def test_closed_forms():
    sure = 50 * torch.eye(4).expand(2, 4, 4)
    assert consistency_loss(sure).item() == pytest.approx(-math.log(4), abs=1e-6)  # sure, diverse, of one opinion
    assert consistency_loss(torch.zeros(2, 5, 4)).item() == pytest.approx(0, abs=1e-6)
    assert consistency_loss(sure[:, :1]).item() == pytest.approx(0, abs=1e-6)  # sure, of one class


def test_target_has_no_gradient(logits):
    leaf = logits.clone().requires_grad_()
    consistency_loss(leaf).backward()
    mean = logits.softmax(2).mean(0)
    target = mean.square() / mean.square().sum(1, keepdim=True)
    other = logits.clone().requires_grad_()
    p = other.softmax(2)
    marginal = p.flatten(0, 1).mean(0)
    (-(target * p.log()).sum(2).mean() + (marginal * marginal.log()).sum()).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_masked_classes(logits):
    logits[:, :, 2] = -torch.inf
    leaf = logits.clone().requires_grad_()
    loss = consistency_loss(leaf)
    loss.backward()
    assert loss.item() == pytest.approx(consistency_loss(logits[:, :, [0, 1, 3]]).item(), rel=1e-9)
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [((5, 4), 0.5, r"\(views, batch, classes\), got \(5, 4\)"), ((2, 5, 4), 0.0, "temperature must lie in")],
)
def test_bad_arguments(shape, temperature, message):
    with pytest.raises(ValueError, match=message):
        consistency_loss(torch.zeros(shape), temperature)
