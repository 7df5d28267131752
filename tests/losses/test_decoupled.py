from __future__ import annotations

import math

import torch

from ttalight.losses import decoupled_entropy


def draw(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def marginal(classes: int) -> torch.Tensor:
    return draw(classes).softmax(0)


def test_value_and_gradient_against_loops():
    logits, mean = draw(5, 4).requires_grad_(), marginal(4)
    values = decoupled_entropy(logits, mean)
    values.sum().backward()
    for row, value, slope in zip(logits.tolist(), values.tolist(), logits.grad.tolist(), strict=True):
        total = math.fsum(map(math.exp, row))
        p = [math.exp(z) / total for z in row]
        expected = math.fsum(a * z for a, z in zip(p, row, strict=True))
        rewards = [a * (1 + z - expected) for a, z in zip(p, row, strict=True)]
        divisor = math.fsum(map(abs, rewards))
        held = math.fsum(m * z for m, z in zip(mean.tolist(), row, strict=True))
        assert math.isclose(value, (held - expected) / divisor)
        for found, m, reward in zip(slope, mean.tolist(), rewards, strict=True):
            assert math.isclose(found, (m - reward) / divisor, abs_tol=1e-12)


def test_with_its_own_prediction_as_the_mean_it_is_the_entropy_but_for_the_divisor():
    logits = draw(1, 6).requires_grad_()
    decoupled_entropy(logits, logits.detach().softmax(1)[0]).sum().backward()
    plain = logits.detach().requires_grad_()
    torch.distributions.Categorical(logits=plain).entropy().sum().backward()
    ratio = logits.grad / plain.grad
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_masked_classes_pixels_shifts_and_half_precision():
    logits, mean = draw(3, 4), marginal(4)
    values = decoupled_entropy(logits, mean)
    torch.testing.assert_close(decoupled_entropy(logits + 100, mean), values)
    more = torch.cat([logits, torch.full((3, 2), -math.inf, dtype=torch.float64)], 1).requires_grad_()
    masked = decoupled_entropy(more, torch.cat([mean, mean.new_zeros(2)]))
    torch.testing.assert_close(masked, values)
    masked.sum().backward()
    assert more.grad.isfinite().all()
    maps = draw(2, 4, 3, 3)
    flat = decoupled_entropy(maps.movedim(1, -1).reshape(-1, 4), mean)
    torch.testing.assert_close(decoupled_entropy(maps, mean).flatten(), flat)
    assert decoupled_entropy(logits.bfloat16(), mean).dtype == torch.float32
