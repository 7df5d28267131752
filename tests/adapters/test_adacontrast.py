"""AdaContrast: bank and queue, predictions, errors. The formulas are in tests/reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttalight.adapters import AdaContrast, Source
from ttalight.adapters.components.moco_view import moco_view
from ttalight.adapters.components.neighbors import FeatureBank


@pytest.fixture
def pixels(images):
    return (images - 0.5) / 2


class TestFeatureBank:
    def test_the_oldest_make_room(self):
        bank = FeatureBank(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64))
        for numbers in ([1, 2, 3], [4, 5, 6], [7]):
            bank.add(torch.tensor(numbers).float()[:, None].expand(-1, 2), torch.tensor(numbers))
        assert bank.values.tolist() == [6, 7, 3, 4, 5]
        assert bank.features[:, 0].tolist() == [6, 7, 3, 4, 5]
        bank.add(torch.arange(10.0, 18)[:, None].expand(-1, 2), torch.arange(10, 18))  # more than there is room for
        assert sorted(bank.values.tolist()) == [13, 14, 15, 16, 17]

    def test_neighbours_are_among_those_that_were_added(self):
        bank = FeatureBank(torch.ones(6, 2), torch.full((6, 1), 100.0))
        bank.add(torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
        means = bank.average_of_nearest(torch.tensor([[5.0, 0.1], [0.0, 0.5]]), 2)
        assert means.flatten().tolist() == [1.5, 2.5]


def test_a_strong_view_keeps_shape_range_and_seed(pixels):
    first, second = (moco_view(pixels[:, :, :4, :5], torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (6, 3, 4, 5)
    assert first.min() >= 0
    assert first.max() <= 1
    assert not torch.equal(first, pixels[:, :, :4, :5])


def test_prediction_before_is_by_the_present_state(make_net, pixels):
    adapted = AdaContrast(prediction="before", queue=20, reset="never", lr=0.1).wrap(make_net())
    assert torch.equal(adapted(pixels), Source().wrap(make_net())(pixels))
    expected = adapted(pixels[:3], adapt=False)
    assert torch.equal(adapted(pixels[:3]), expected)


def test_refuses_dense_predictions(pixels):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)).double()
    with pytest.raises(ValueError, match=r"AdaContrast compares .* got logits of shape \(6, 4, 30, 30\): for dense"):
        AdaContrast().wrap(net)(pixels)
