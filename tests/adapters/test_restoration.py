"""Ways back to the source weights; the gradient of the drift is tested beside EATA, which it serves."""

from __future__ import annotations

import pytest
import torch

from ttalight.adapters.components.regularization import ema_update_

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
    ema_update_(weights, source, share)
    assert all(torch.equal(weight, torch.full_like(weight, expected)) for weight in weights)
    assert all(one is other for one, other in zip(weights, same, strict=True))  # in place
    assert all((original == 1).all() for original in source)


def test_repeated_moves_are_an_exponential_average(weights, source):
    for _ in range(10):
        ema_update_(weights, source, 0.1)
    torch.testing.assert_close(weights[0], 1 + 4 * torch.full(SHAPES[0], 0.9**10, dtype=torch.float64))
