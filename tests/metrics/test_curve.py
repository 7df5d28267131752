"""Accuracy along a stream."""

from __future__ import annotations

import numpy as np
import pytest

from ttalight.metrics import RunningCurve


def test_few_batches_are_kept_as_they_are():
    curve = RunningCurve(points=4)
    for images, accuracy in ((10, 0.5), (30, 1.0), (10, 0.0)):
        curve.add(images, accuracy)
    values = curve.values()
    assert values["images"] == [10, 40, 50]
    assert values["accuracy"] == [0.5, 1.0, 0.0]
    assert values["running"] == pytest.approx([0.5, 35 / 40, 35 / 50])


@pytest.mark.parametrize("batches", [1, 8, 9, 63, 64, 65, 1000])
def test_any_number_of_batches_fits_and_none_is_lost(batches):
    generator = np.random.default_rng(batches)
    sizes, shares = generator.integers(1, 9, batches), generator.random(batches)
    curve = RunningCurve(points=8)
    for size, share in zip(sizes.tolist(), shares.tolist(), strict=True):
        curve.add(size, share)
    values = curve.values()
    assert min(batches, 5) <= len(values["images"]) <= 8
    seen, hits = np.cumsum(sizes), np.cumsum(sizes * shares)
    assert values["images"][-1] == seen[-1]
    for images, running in zip(values["images"], values["running"], strict=True):
        end = int(np.searchsorted(seen, images))
        assert seen[end] == images  # stretches end where batches do
        assert running == pytest.approx(hits[end] / images)
    lengths = np.diff([0, *values["images"]])
    assert np.dot(lengths, values["accuracy"]) == pytest.approx(hits[-1])


@pytest.mark.parametrize("points", [0, 3])
def test_points_come_in_pairs(points):
    with pytest.raises(ValueError, match=f"points must be even and at least 2, got {points}"):
        RunningCurve(points)
