"""Moment alignment against sums over pairs of features, in Python floats."""

from __future__ import annotations

import pytest
import torch

from ttalight.losses import MomentAlignment, MomentSummary, covariance_distance, feature_moments, mean_distance


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(row[j] for row in rows) / len(rows) for j in range(len(rows[0]))]


def _covariance(rows: list[list[float]]) -> list[list[float]]:
    """Half the average product of differences over all ordered pairs of two rows: no mean is taken."""
    size, width = len(rows), len(rows[0])
    return [
        [sum((a[i] - b[i]) * (a[j] - b[j]) for a in rows for b in rows) / (2 * size * (size - 1)) for j in range(width)]
        for i in range(width)
    ]


def _covariance_distance(first: list[list[float]], second: list[list[float]]) -> float:
    width = len(first)
    total = sum((first[i][j] - second[i][j]) ** 2 for i in range(width) for j in range(width))
    return total / (4 * width * width)


def _mean_distance(first: list[float], second: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 4, dtype=torch.float64, generator=generator) * 2 + 1 for size in (5, 3, 7, 2)]


def test_moments(batches):
    for batch in batches:
        mean, covariance = feature_moments(batch)
        assert mean.tolist() == pytest.approx(_mean(batch.tolist()), rel=1e-10)
        for own, expected in zip(covariance.tolist(), _covariance(batch.tolist()), strict=True):
            assert own == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_distances(batches):
    (mean_a, covariance_a), (mean_b, covariance_b) = map(feature_moments, batches[:2])
    expected = _covariance_distance(covariance_a.tolist(), covariance_b.tolist())
    assert covariance_distance(covariance_a, covariance_b).item() == pytest.approx(expected, rel=1e-10)
    assert mean_distance(mean_a, mean_b).item() == pytest.approx(
        _mean_distance(mean_a.tolist(), mean_b.tolist()), rel=1e-10
    )


def test_summary_and_loss(batches):
    summary = MomentSummary()
    for batch in batches:
        summary.add(batch)
    rows = torch.cat(batches).tolist()
    covariances = [_covariance(batch.tolist()) for batch in batches]
    means = [_mean(batch.tolist()) for batch in batches]
    spread = [
        sum(_covariance_distance(covariances[0], other) for other in covariances[1:]) / 3,
        sum(_mean_distance(means[0], other) for other in means[1:]) / 3,
    ]
    mean, covariance, apart = summary.result()
    assert mean.tolist() == pytest.approx(_mean(rows), rel=1e-10)
    for own, expected in zip(covariance.tolist(), _covariance(rows), strict=True):
        assert own == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert apart.tolist() == pytest.approx(spread, rel=1e-9)

    alignment = MomentAlignment(4, weight=0.3).double()
    alignment.summarize(summary)
    target = batches[1] * 3 - 1
    loss = alignment(target)
    expected = 0.3 * (
        _covariance_distance(_covariance(rows), _covariance(target.tolist())) / spread[0]
        + _mean_distance(_mean(rows), _mean(target.tolist())) / spread[1] / 2
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9)
