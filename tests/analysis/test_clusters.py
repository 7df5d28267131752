"""Measures of features against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.clustering import davies_bouldin_score

from ttalight.analysis import class_medians, davies_bouldin, median_distance


def blobs(spread: float = 1.0, size: int = 90, classes: int = 4, dim: int = 6):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, classes, (size,), generator=generator)
    centres = 4 * torch.randn(classes, dim, generator=generator)
    return centres[labels] + spread * torch.randn(size, dim, generator=generator), labels


def slow_index(features, labels):
    """The definition, class by class, in float64."""
    points, labels = features.double().numpy(), labels.numpy()
    kinds = sorted(set(labels.tolist()))
    centres = {kind: points[labels == kind].mean(axis=0) for kind in kinds}
    widths = {
        kind: np.mean([np.sqrt(((point - centres[kind]) ** 2).sum()) for point in points[labels == kind]])
        for kind in kinds
    }
    worst = [
        max(
            (widths[one] + widths[other]) / np.sqrt(((centres[one] - centres[other]) ** 2).sum())
            for other in kinds
            if other != one
        )
        for one in kinds
    ]
    return sum(worst) / len(worst)


class TestDaviesBouldin:
    def test_is_the_definition(self):
        features, labels = blobs()
        assert davies_bouldin(features, labels) == pytest.approx(slow_index(features, labels), rel=1e-9)

    def test_is_scikit_learns(self):
        metrics = pytest.importorskip("sklearn.metrics")
        features, labels = blobs(2.0, size=200, classes=30, dim=12)
        expected = metrics.davies_bouldin_score(features.numpy(), labels.numpy())
        assert davies_bouldin(features, labels) == pytest.approx(expected, rel=1e-5)

    def test_is_that_of_torchmetrics_for_few_classes(self):
        features, labels = blobs(classes=10)
        assert davies_bouldin(features, labels) == pytest.approx(
            float(davies_bouldin_score(features, labels)), rel=1e-4
        )

    @pytest.mark.parametrize(("factor", "shift"), [(1e-6, 0.0), (1e5, 0.0), (1.0, 1e5), (1e-5, 3.0)])
    def test_depends_neither_on_scale_nor_on_place(self, factor, shift):
        features, labels = blobs(size=400, classes=40)
        moved = factor * features.double() + shift
        assert davies_bouldin(moved, labels) == pytest.approx(slow_index(features, labels), rel=1e-6)

    def test_tight_classes_are_better(self):
        assert davies_bouldin(*blobs(0.1)) < davies_bouldin(*blobs(1.0)) < davies_bouldin(*blobs(5.0))

    def test_labels_need_not_begin_at_zero(self):
        features, labels = blobs()
        assert davies_bouldin(features, 7 * labels + 3) == davies_bouldin(features, labels)

    @pytest.mark.parametrize("labels", [torch.zeros(5, dtype=torch.long), torch.arange(5)])
    def test_needs_classes_and_samples(self, labels):
        with pytest.raises(ValueError, match=r"needs two classes at least, .* got \d classes of 5 samples"):
            davies_bouldin(torch.randn(5, 2), labels)

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match=r"expected floating-point features \(N, D\) .* got \(5, 2\)"):
            davies_bouldin(torch.randn(5, 2), torch.zeros(4, dtype=torch.long))


class TestMedians:
    def test_are_numpys(self):
        features, labels = blobs(size=61)
        found = class_medians(features, labels, 5)
        for label in range(4):
            expected = np.median(features.numpy()[labels.numpy() == label], axis=0)
            assert np.allclose(found[label].numpy(), expected)
        assert found[4].isnan().all()

    def test_one_sample_that_is_far_off_does_not_move_them(self):
        features, labels = blobs(size=61)
        own = (labels == 1).nonzero().flatten()
        spoilt = features.clone()
        spoilt[own[0]] = 1e6
        moved = (class_medians(spoilt, labels, 4)[1] - class_medians(features, labels, 4)[1]).abs().max()
        assert moved < 3

    def test_refuses_labels_out_of_range(self):
        with pytest.raises(ValueError, match="labels must be in 0 to 2, got 0 to 3"):
            class_medians(*blobs(), 3)


class TestMedianDistance:
    def test_is_the_length_of_a_shift(self):
        features, labels = blobs()
        reference = class_medians(features, labels, 4)
        shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
        found = median_distance(features + shift, labels, reference)
        assert found.mean == pytest.approx(5, rel=1e-5)
        assert found.total == pytest.approx(20, rel=1e-5)
        assert found.relative == pytest.approx(5 / float(reference.norm(dim=1).mean()), rel=1e-5)

    def test_relative_does_not_see_a_common_scale(self):
        features, labels = blobs()
        reference = class_medians(features, labels, 4)
        near = median_distance(features + 1, labels, reference)
        far = median_distance(10 * (features + 1), labels, 10 * reference)
        assert far.mean == pytest.approx(10 * near.mean, rel=1e-4)
        assert far.relative == pytest.approx(near.relative, rel=1e-4)

    def test_counts_the_classes_that_both_have(self):
        features, labels = blobs()
        reference = class_medians(features, labels, 4)
        reference[2] = torch.nan
        kept = labels != 1
        found = median_distance(features[kept] + 1, labels[kept], reference)
        assert found.total == pytest.approx(2 * found.mean)
        reference[:] = torch.nan
        assert median_distance(features, labels, reference) is None

    def test_refuses_another_dimension(self):
        with pytest.raises(ValueError, match=r"same dimension, got \(90, 6\) and \(4, 5\)"):
            median_distance(*blobs(), torch.zeros(4, 5))
