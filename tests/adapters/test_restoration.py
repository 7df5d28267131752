"""Ways back to the source weights; the gradient of the drift is tested beside EATA, which it serves."""

from __future__ import annotations

import pytest
import torch

from ttalight.adapters.components.regularization import move_towards, restore_at_random

SHAPES = [(200, 30), (4000,)]


@pytest.fixture
def weights():
    return [torch.full(shape, 5.0, dtype=torch.float64) for shape in SHAPES]


@pytest.fixture
def source():
    return [torch.full(shape, 1.0, dtype=torch.float64) for shape in SHAPES]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 5.0), (0.25, 4.0), (1.0, 1.0)])
def test_a_share_of_the_way(weights, source, share, expected):
    same = list(weights)
    move_towards(weights, source, share)
    assert all(torch.equal(weight, torch.full_like(weight, expected)) for weight in weights)
    assert all(one is other for one, other in zip(weights, same, strict=True))  # in place
    assert all((original == 1).all() for original in source)


def test_repeated_moves_are_an_exponential_average(weights, source):
    for _ in range(10):
        move_towards(weights, source, 0.1)
    torch.testing.assert_close(weights[0], 1 + 4 * torch.full(SHAPES[0], 0.9**10, dtype=torch.float64))


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.3, 1.0])
def test_so_many_single_weights_are_restored(weights, source, probability):
    restore_at_random(weights, source, probability, torch.Generator().manual_seed(0))
    values = torch.cat([weight.flatten() for weight in weights])
    assert set(values.tolist()) <= {1.0, 5.0}
    spread = (probability * (1 - probability) / len(values)) ** 0.5
    assert abs((values == 1).double().mean().item() - probability) <= 4 * spread


def test_the_generator_chooses(weights, source):
    def restored(seed):
        moved = [weight.clone() for weight in weights]
        restore_at_random(moved, source, 0.3, torch.Generator().manual_seed(seed))
        return moved

    assert all(map(torch.equal, restored(1), restored(1)))
    assert not any(map(torch.equal, restored(1), restored(2)))
