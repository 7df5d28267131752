from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import entropy, opinion_entropy


def draw(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_beliefs_and_uncertainty_share_the_mass():
    logits = draw(6, 4)
    for row, found in zip(logits.tolist(), opinion_entropy(logits).tolist(), strict=True):
        total = sum(math.exp(value) for value in row) + 4
        shares = [math.exp(value) / total for value in row] + [4 / total]
        assert sum(shares) == pytest.approx(1)
        assert found == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_gradients_turn_logits_and_leave_their_norm():
    logits = draw(6, 4).requires_grad_()
    opinion_entropy(logits).sum().backward()
    torch.testing.assert_close((logits.grad * logits.detach()).sum(1), torch.zeros(6, dtype=torch.float64))
    values = logits.detach().requires_grad_()
    evidence = torch.cat([values, torch.full((6, 1), math.log(4), dtype=torch.float64)], 1)
    entropy(evidence).sum().backward()
    unit = values.detach() / values.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(logits.grad, values.grad - unit * (values.grad * unit).sum(1, keepdim=True))


def test_little_evidence_is_uncertain_whatever_the_prediction():
    weak = torch.tensor([[-20.0, -30.0]])  # sure by softmax, with evidence for nothing
    assert entropy(weak) < 1e-3
    opinion = opinion_entropy(weak)
    assert opinion < 1e-6  # all mass is uncertainty
    assert not torch.autograd.functional.jacobian(opinion_entropy, weak).abs().max() > 1e-6


def test_masked_classes_do_not_count():
    logits = draw(5, 4)
    more = torch.cat([logits, torch.full((5, 3), -math.inf, dtype=torch.float64)], 1).requires_grad_()
    torch.testing.assert_close(opinion_entropy(more), opinion_entropy(logits))
    opinion_entropy(more).sum().backward()
    assert more.grad.isfinite().all()


def test_maps_zeros_and_half_precision():
    maps = draw(2, 4, 3, 3)
    torch.testing.assert_close(opinion_entropy(maps).flatten(), opinion_entropy(maps.movedim(1, -1).reshape(-1, 4)))
    zeros = torch.zeros(1, 4, requires_grad=True)
    value = opinion_entropy(zeros)
    assert value.item() == pytest.approx(math.log(2) + 0.5 * math.log(4))
    value.backward()
    assert zeros.grad.isfinite().all()
    assert opinion_entropy(maps.bfloat16()).dtype == torch.float32
