from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import entropy


def test_uniform_and_certain_predictions():
    logits = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1000.0, 0.0, -1000.0, 5.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), 0.0]))


def test_classes_are_dimension_1():
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    values = entropy(logits)
    assert values.shape == (2, 3, 4)
    torch.testing.assert_close(values.flatten(), entropy(logits.movedim(1, -1).reshape(-1, 5)))


def test_impossible_classes_contribute_nothing():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fewer = logits.clone().requires_grad_()
    more = torch.cat((logits, torch.full((3, 2), -math.inf, dtype=torch.float64)), 1).requires_grad_()
    torch.testing.assert_close(entropy(more), entropy(fewer))
    entropy(more).sum().backward()
    entropy(fewer).sum().backward()
    torch.testing.assert_close(more.grad[:, :4], fewer.grad)
    assert not more.grad[:, 4:].any()


def test_gradient_is_finite_at_underflow():
    logits = torch.tensor([[0.0, -300.0, -1e30]], requires_grad=True)
    entropy(logits).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(1, 3))


def test_gradients():
    logits = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy, (logits,))


def test_shift_of_all_logits_changes_nothing():
    logits = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(entropy(logits + 700), entropy(logits))
    torch.testing.assert_close(entropy(logits.log_softmax(1)), entropy(logits))


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 100).bfloat16()
    assert entropy(logits).dtype == torch.float32
    assert torch.equal(entropy(logits), entropy(logits.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(entropy(logits), entropy(logits.float()))


def test_broken_logits_are_not_hidden():
    values = entropy(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]))
    assert values.isnan().tolist() == [True, False]


def test_needs_a_class_dimension():
    with pytest.raises(ValueError, match=r"\(batch, classes\).*got \(10,\)"):
        entropy(torch.zeros(10))
