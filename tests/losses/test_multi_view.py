"""The contrastive loss of several views against closed forms and the loss of two views."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import contrastive_loss, multi_view_contrastive_loss


@pytest.fixture
def views():
    return torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_is_the_mean_over_anchors_and_positives(views):
    flat = [(image, view / view.norm()) for image, own in enumerate(views) for view in own]
    expected = []
    for place, (image, anchor) in enumerate(flat):
        candidates = [(number, math.exp(anchor @ view / 0.2)) for number, view in flat[:place] + flat[place + 1 :]]
        total = sum(value for _, value in candidates)
        expected.append(-sum(math.log(value / total) for number, value in candidates if number == image) / 2)
    per_image = [sum(expected[3 * image : 3 * image + 3]) / 3 for image in range(4)]
    assert multi_view_contrastive_loss(5 * views, 0.2).tolist() == pytest.approx(per_image)


def test_of_two_views_is_the_usual_one(views):
    losses = multi_view_contrastive_loss(views[:, :2], 0.1)
    torch.testing.assert_close(losses.mean(), contrastive_loss(views[:, 0], views[:, 1], 0.1))


def test_one_image_is_finite(views):
    same = views[:1, :1].expand(1, 3, 6).clone().requires_grad_()
    loss = multi_view_contrastive_loss(same, 0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: multi_view_contrastive_loss(x, 0.5), views[:1].clone().requires_grad_())


def test_zero_vectors_have_no_gradient(views):
    zero = views.index_fill(1, torch.tensor([0]), 0.0).requires_grad_()
    multi_view_contrastive_loss(zero, 0.1).sum().backward()
    assert zero.grad.isfinite().all()
    assert not zero.grad[:, 0].any()


def test_half_precision_is_computed_in_full(views):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = multi_view_contrastive_loss(views.bfloat16(), 0.1)
    assert loss.dtype == torch.float32
    expected = multi_view_contrastive_loss(views.bfloat16().double(), 0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [
        ((4, 6), 0.1, r"views of shape \(batch, two views or more, dimension\), got \(4, 6\)"),
        ((4, 1, 6), 0.1, r"got \(4, 1, 6\)"),
        ((4, 3, 6), 0.0, "temperature must be positive"),
    ],
)
def test_bad_input(shape, temperature, message):
    with pytest.raises(ValueError, match=message):
        multi_view_contrastive_loss(torch.zeros(shape), temperature)
