from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttalight.losses import ContrastiveLoss, contrastive_loss


@pytest.fixture
def views() -> torch.Tensor:
    return torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [2, 5, 32])
def test_equal_vectors_cannot_be_told_apart(size, symmetric):
    same = torch.ones(size, 4, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(same, same, 0.01, symmetric=symmetric)
    assert loss.item() == pytest.approx(math.log(2 * size - 1), rel=1e-12)
    loss.backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-10)


def test_orthogonal_pairs_have_a_closed_form():
    vectors = torch.eye(5, dtype=torch.float64)
    loss = contrastive_loss(vectors, 3 * vectors, 0.5)
    assert loss.item() == pytest.approx(math.log(1 + 8 * math.exp(-2)), rel=1e-12)


def test_only_directions_matter(views):
    lengths = torch.rand(2, 6, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(contrastive_loss(*(views * lengths), 0.1), contrastive_loss(*views, 0.1))


def test_views_and_images_can_be_exchanged(views):
    first, second = views
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    loss = contrastive_loss(first, second, 0.1)
    torch.testing.assert_close(contrastive_loss(second, first, 0.1), loss)
    torch.testing.assert_close(contrastive_loss(first[order], second[order], 0.1), loss)
    assert not torch.isclose(contrastive_loss(first[order], second, 0.1), loss)


def test_symmetric_is_mean_of_one_sided_losses(views):
    first, second = views
    one_sided = [contrastive_loss(*pair, 0.1, symmetric=False) for pair in ((first, second), (second, first))]
    assert not torch.isclose(*one_sided)
    torch.testing.assert_close(contrastive_loss(first, second, 0.1), sum(one_sided) / 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients(views, symmetric):
    inputs = [view[:3].clone().requires_grad_() for view in views]
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, b, 0.2, symmetric=symmetric), inputs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_many_anchors_are_as_one_matrix(symmetric):
    views = torch.randn(2, 1100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [view.clone().requires_grad_() for view in views]
    loss = contrastive_loss(*inputs, 0.05, symmetric=symmetric)
    units = torch.nn.functional.normalize(torch.cat(inputs), dim=1)
    whole = (units @ units.T / 0.05).masked_fill(torch.eye(2200, dtype=torch.bool), -torch.inf)
    terms = torch.nn.functional.cross_entropy(whole, torch.arange(2200).roll(1100), reduction="none")
    expected = (terms if symmetric else terms[:1100]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(3 * one, inputs) for one in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_memory_grows_linearly_with_the_batch():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    self.seen = max(self.seen, value.numel())
            return out

    first, second = torch.randn(2, 2048, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with Largest() as largest:
        contrastive_loss(first, second, 0.1).backward()
    assert largest.seen <= 1024 * 4096


def test_similarities_are_float32_under_autocast(views):
    first, second = views.bfloat16()
    exact = contrastive_loss(first.double(), second.double(), 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(first, second, 0.01)
        from_float = contrastive_loss(first.float(), second.float(), 0.01)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert torch.equal(from_float, contrastive_loss(first.float(), second.float(), 0.01))
    assert contrastive_loss(*views, 0.01).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharp_temperatures_keep_finite_gradients(dtype):
    first = torch.eye(4, dtype=dtype).roll(1, 0).requires_grad_()  # every partner is at a right angle, another is equal
    loss = contrastive_loss(first, torch.eye(4, dtype=dtype), 0.001)
    assert loss.item() == pytest.approx(1000, rel=1e-3)
    loss.backward()
    assert first.grad.isfinite().all()
    assert first.grad.any()


def test_zero_vectors_have_no_gradient(views):
    first = views[0].clone()
    first[2] = 0
    first.requires_grad_()
    loss = contrastive_loss(first, views[1], 0.1)
    loss.backward()
    assert loss.isfinite()
    assert first.grad.isfinite().all()
    assert not first.grad[2].any()
    assert first.grad[[0, 1, 3, 4, 5]].abs().sum(1).all()
    assert first.grad.abs().max() < 100


def test_descending_brings_partners_together():
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(8, 4, generator=generator).requires_grad_()
    second = torch.randn(8, 4, generator=generator)
    before = torch.cosine_similarity(first, second).mean().item()
    for _ in range(100):
        (gradient,) = torch.autograd.grad(contrastive_loss(first, second, 0.5), first)
        first = (first - 2 * gradient).detach().requires_grad_()
    assert torch.cosine_similarity(first, second).mean().item() > before + 0.3


def test_gather_without_processes_changes_nothing(views):
    assert torch.equal(contrastive_loss(*views, 0.1, gather=True), contrastive_loss(*views, 0.1))


def test_inputs_stay_as_they_are(views):
    copy = views.clone()
    contrastive_loss(*views, 0.1)
    assert torch.equal(views, copy)


def test_module_passes_its_arguments_on(views):
    module = ContrastiveLoss(0.2, symmetric=False)
    assert torch.equal(module(*views), contrastive_loss(*views, 0.2, symmetric=False))
    assert torch.equal(ContrastiveLoss()(*views), contrastive_loss(*views, 0.01))
    assert "temperature=0.2, symmetric=False" in repr(module)


def test_errors(views):
    first, second = views
    with pytest.raises(ValueError, match=r"at least 2 images in a batch, got 1: use a batch size of 2.*drop_last"):
        contrastive_loss(first[:1], second[:1], 0.1)
    with pytest.raises(ValueError, match=r"first \(6, 8\), second \(5, 8\)"):
        contrastive_loss(first, second[:5], 0.1)
    with pytest.raises(ValueError, match=r"flatten maps.*|first \(6, 8, 1, 1\)"):
        contrastive_loss(first[..., None, None], second[..., None, None], 0.1)
    for temperature in (0, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive"):
            contrastive_loss(first, second, temperature)
        with pytest.raises(ValueError, match="temperature must be positive"):
            ContrastiveLoss(temperature)
