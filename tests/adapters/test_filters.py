"""Filters and weights of samples, one by one."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.adapters.components.filters import (
    confidence_weight,
    entropy_margin,
    entropy_margins,
    probability_drop,
    redundancy,
    update_mean,
)

NAN = math.nan


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def probabilities():
    return double([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.4, 0.3, 0.3]])


def test_margin_is_a_share_of_the_largest_entropy():
    assert entropy_margin(0.4, 10) == pytest.approx(0.4 * 2.302585)
    assert entropy_margin(1.0, 1000) == pytest.approx(6.907755)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margins_without_masked_classes_are_exact(dtype):
    for classes in (2, 3, 10, 49, 1000):
        margin, margins = entropy_margin(0.4, classes), entropy_margins(0.4, torch.zeros(2, classes, dtype=dtype))
        assert torch.equal(margins, torch.full((2,), margin, dtype=dtype))
        assert torch.equal(entropy_margins(0.4, torch.zeros(2, classes, 3, 3, dtype=dtype)), margins)


def test_margins_count_the_classes_that_are_not_masked(waits):
    logits = torch.zeros(3, 10, dtype=torch.float64)
    logits[1, 5:] = logits[2, 1:] = -torch.inf
    with waits:
        margins = entropy_margins(0.4, logits)
        dense = entropy_margins(0.4, logits.T.reshape(1, 10, 3, 1))
    assert not waits.read
    assert not waits.masked
    assert margins.tolist() == pytest.approx([entropy_margin(0.4, count) for count in (10, 5, 1)])
    assert dense.tolist() == pytest.approx([margins.mean().item()])


def test_certain_samples_weigh_more_without_gradient():
    entropies = double([0.0, 0.5, 2.0]).requires_grad_()
    weights = confidence_weight(entropies, 0.5)
    assert weights.tolist() == pytest.approx([math.exp(0.5), 1.0, math.exp(-1.5)])
    assert not weights.requires_grad


class TestRedundancy:
    def test_is_the_cosine(self, probabilities):
        mean = double([0.5, 0.3, 0.2])
        expected = []
        for row in probabilities.tolist():
            dot = sum(a * b for a, b in zip(row, mean.tolist(), strict=True))
            expected.append(dot / math.sqrt(sum(a * a for a in row)) / math.sqrt(0.25 + 0.09 + 0.04))
        assert redundancy(probabilities, mean).tolist() == pytest.approx(expected)
        assert redundancy(probabilities, 3 * probabilities[1])[1].item() == pytest.approx(1)

    def test_an_unset_mean_makes_nothing_redundant(self, probabilities):
        cosines = redundancy(probabilities, torch.full((3,), NAN, dtype=torch.float64))
        assert cosines.isnan().all()
        assert not (cosines >= 0.4).any()


class TestUpdateMean:
    @pytest.mark.parametrize(
        ("mean", "kept", "momentum", "expected"),
        [
            ([NAN, NAN, NAN], [True, False, True, False], 0.9, [0.45, 0.2, 0.35]),  # the first is taken as it is
            ([0.5, 0.3, 0.2], [True, False, True, False], 0.9, [0.495, 0.29, 0.215]),
            ([0.5, 0.3, 0.2], [False, True, False, False], 0.0, [0.1, 0.8, 0.1]),
            ([0.5, 0.3, 0.2], [False] * 4, 0.9, [0.5, 0.3, 0.2]),
            ([NAN, NAN, NAN], [False] * 4, 0.9, [NAN, NAN, NAN]),
        ],
    )
    def test_moves_to_the_mean_of_the_kept(self, probabilities, mean, kept, momentum, expected):
        mean = double(mean)
        update_mean(mean, probabilities, torch.tensor(kept), momentum)
        assert mean.tolist() == pytest.approx(expected, nan_ok=True)

    @pytest.mark.parametrize("mean", [[NAN, NAN, NAN], [0.5, 0.3, 0.2]])
    def test_rows_that_are_no_numbers_do_not_spoil_it(self, probabilities, mean):
        spoilt, clean = double(mean), double(mean)
        probabilities[1] = NAN
        update_mean(spoilt, probabilities, torch.tensor([True, False, True, True]))  # dropped, as such rows are
        update_mean(clean, probabilities[[0, 2, 3]], torch.ones(3, dtype=torch.bool))
        assert torch.equal(spoilt, clean)
        assert spoilt.isfinite().all()
        update_mean(spoilt, probabilities, torch.ones(4, dtype=torch.bool))  # kept all the same
        assert torch.equal(spoilt, clean)

    def test_its_precision_stays_and_no_gradient_is_kept(self, probabilities):
        mean = torch.full((3,), NAN, dtype=torch.float64)
        update_mean(mean, probabilities.float().requires_grad_(), torch.ones(4, dtype=torch.bool))
        assert mean.dtype == torch.float64
        assert not mean.requires_grad


def test_drop_is_that_of_the_likeliest_class_before(probabilities):
    changed = double([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0], [0.2, 0.5, 0.3]])
    drops = probability_drop(probabilities.log() + 5, changed.log())
    assert drops.tolist() == pytest.approx([0.6, 0.0, -0.4, 0.2])
