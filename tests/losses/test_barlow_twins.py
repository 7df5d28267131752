from __future__ import annotations

import pytest
import torch

from ttalight.losses import barlow_twins_loss


@pytest.fixture
def views() -> torch.Tensor:
    return torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_minimum_at_equal_independent_views():
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert barlow_twins_loss(signs, 3 * signs + 7, 1.0).item() == pytest.approx(0, abs=1e-9)


def test_a_copied_dimension_costs_its_two_correlations():
    signs = torch.tensor([[1, 1], [1, 1], [-1, -1], [-1, -1]], dtype=torch.float64)
    assert barlow_twins_loss(signs, signs, 0.25).item() == pytest.approx(2 * 0.25, rel=1e-4)


def test_opposite_views_cost_most():
    column = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert barlow_twins_loss(column, -column).item() == pytest.approx(4, rel=1e-4)


def test_scale_and_offset_of_a_dimension_do_not_matter(views):
    scales = torch.tensor([3.0, 5, 7, 9], dtype=torch.float64)
    moved = barlow_twins_loss(views[0] * scales + 2, views[1])
    torch.testing.assert_close(moved, barlow_twins_loss(*views), rtol=1e-4, atol=0)


def test_views_and_images_can_be_exchanged(views):
    first, second = views
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    loss = barlow_twins_loss(first, second)
    torch.testing.assert_close(barlow_twins_loss(second, first), loss)
    torch.testing.assert_close(barlow_twins_loss(first[order], second[order]), loss)
    assert not torch.isclose(barlow_twins_loss(first[order], second), loss)


def test_gradients(views):
    inputs = [view.clone().requires_grad_() for view in views]
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins_loss(a, b, 0.1), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_features_stay_finite(dtype, value):
    first = torch.full((5, 3), value, dtype=dtype, requires_grad=True)
    loss = barlow_twins_loss(first, first)
    loss.backward()
    assert loss.item() == pytest.approx(3)
    assert not first.grad.any()


def test_a_dimension_that_one_view_lost_stays_finite(views):
    first = views[0].float()
    first[:, 1] = 1
    first.requires_grad_()
    loss = barlow_twins_loss(first, views[1].float())
    loss.backward()
    assert loss.isfinite()
    assert first.grad.isfinite().all()


def test_correlations_are_float32_under_autocast(views):
    first, second = views.bfloat16()
    exact = barlow_twins_loss(first.double(), second.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = barlow_twins_loss(first, second)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert barlow_twins_loss(*views).dtype == torch.float64


def test_gather_without_processes_changes_nothing(views):
    assert torch.equal(barlow_twins_loss(*views, gather=True), barlow_twins_loss(*views))


def test_errors(views):
    first, second = views
    with pytest.raises(ValueError, match="at least 2 images in a batch, got 1"):
        barlow_twins_loss(first[:1], second[:1])
    with pytest.raises(ValueError, match=r"first \(6, 4\), second \(5, 4\)"):
        barlow_twins_loss(first, second[:5])
    for redundancy in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="redundancy must be at least 0"):
            barlow_twins_loss(first, second, redundancy)
