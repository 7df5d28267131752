from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import AlignmentLoss, alignment_loss

SIBLINGS = ["negative", "exclude", "positive"]


@pytest.fixture
def triplet() -> torch.Tensor:
    return torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("size", [2, 7])
def test_equal_vectors_cannot_be_told_apart(size, sibling):
    same = torch.ones(size, 4, dtype=torch.float64)
    left = 3 * size - (2 if sibling == "exclude" else 1)
    assert alignment_loss(same, same, same, 0.01, sibling=sibling).item() == pytest.approx(math.log(left), rel=1e-12)


@pytest.mark.parametrize(("sibling", "rivals"), [("negative", 1), ("exclude", 0), ("positive", 1)])
def test_perfect_alignment_has_a_closed_form(sibling, rivals):
    vectors, size, temperature = torch.eye(5, dtype=torch.float64), 5, 0.5
    # The sibling is as near as the target; 3(B - 1) vectors of other images are at right angles.
    expected = math.log(1 + rivals + 3 * (size - 1) * math.exp(-1 / temperature))
    loss = alignment_loss(vectors, 2 * vectors, 3 * vectors, temperature, sibling=sibling)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_views_and_images_can_be_exchanged(triplet, sibling):
    first, second, target = triplet
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    loss = alignment_loss(first, second, target, 0.3, sibling=sibling)
    torch.testing.assert_close(alignment_loss(second, first, target, 0.3, sibling=sibling), loss)
    torch.testing.assert_close(alignment_loss(*triplet[:, order], 0.3, sibling=sibling), loss)
    assert not torch.isclose(alignment_loss(first, second, target[order], 0.3, sibling=sibling), loss)


def test_the_three_readings_differ(triplet):
    negative, exclude, positive = (alignment_loss(*triplet, 0.3, sibling=sibling) for sibling in SIBLINGS)
    assert exclude < negative  # one term less below the fraction
    assert not torch.isclose(positive, negative)


def test_only_directions_matter(triplet):
    lengths = torch.rand(3, 6, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(alignment_loss(*(triplet * lengths), 0.1), alignment_loss(*triplet, 0.1))


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_gradients_reach_views_and_targets(triplet, sibling):
    inputs = [vectors[:3].clone().requires_grad_() for vectors in triplet]
    assert torch.autograd.gradcheck(lambda a, b, w: alignment_loss(a, b, w, 0.2, sibling=sibling), inputs)


def test_detached_targets_get_no_gradient(triplet):
    first, second, target = (vectors.clone().requires_grad_() for vectors in triplet)
    alignment_loss(first, second, target.detach(), 0.2).backward()
    assert target.grad is None
    assert first.grad.any()
    assert second.grad.any()


def test_similarities_are_float32_under_autocast(triplet):
    vectors = triplet.bfloat16()
    exact = alignment_loss(*vectors.double(), 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alignment_loss(*vectors, 0.01)
        from_float = alignment_loss(*vectors.float(), 0.01)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert torch.equal(from_float, alignment_loss(*vectors.float(), 0.01))


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_sharp_temperatures_and_zeros_stay_finite(triplet, sibling):
    vectors = triplet.float()
    vectors[0, 1] = vectors[1, 1]
    vectors[:, 2] = 0
    vectors.requires_grad_()
    loss = alignment_loss(*vectors, 0.001, sibling=sibling)
    loss.backward()
    assert loss.isfinite()
    assert vectors.grad.isfinite().all()
    assert not vectors.grad[:, 2].any()


def test_descending_brings_views_to_their_targets():
    generator = torch.Generator().manual_seed(4)
    views = torch.randn(2, 8, 6, generator=generator).requires_grad_()
    target = torch.randn(8, 6, generator=generator)
    before = torch.cosine_similarity(views, target[None], dim=2).mean().item()
    for _ in range(100):
        (gradient,) = torch.autograd.grad(alignment_loss(*views, target, 0.5), views)
        views = (views - 4 * gradient).detach().requires_grad_()
    assert torch.cosine_similarity(views, target[None], dim=2).mean().item() > before + 0.3


def test_gather_without_processes_changes_nothing(triplet):
    assert torch.equal(alignment_loss(*triplet, 0.1, gather=True), alignment_loss(*triplet, 0.1))


def test_module_passes_its_arguments_on(triplet):
    module = AlignmentLoss(0.2, "positive")
    assert torch.equal(module(*triplet), alignment_loss(*triplet, 0.2, sibling="positive"))
    assert torch.equal(AlignmentLoss()(*triplet), alignment_loss(*triplet, 0.5))
    assert "temperature=0.2, sibling='positive'" in repr(module)


def test_errors(triplet):
    first, second, target = triplet
    with pytest.raises(ValueError, match=r"at least 2 images in a batch, got 1: use a batch size of 2.*drop_last"):
        alignment_loss(*triplet[:, :1], 0.1)
    with pytest.raises(ValueError, match=r"first \(6, 8\), second \(6, 8\), target \(6, 7\)"):
        alignment_loss(first, second, target[:, :7], 0.1)
    with pytest.raises(ValueError, match="temperature must be positive"):
        alignment_loss(*triplet, 0.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        AlignmentLoss(-1.0)
    for build in (lambda: AlignmentLoss(0.5, "ignore"), lambda: alignment_loss(*triplet, 0.5, sibling="ignore")):
        with pytest.raises(ValueError, match="sibling must be one of negative, exclude, positive, got 'ignore'"):
            build()
