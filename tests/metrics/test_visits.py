"""Many visits measured at once."""

from __future__ import annotations

import pytest
import torch

from ttalight.metrics import StreamingClassification, VisitMetrics


def of(logits, labels):
    metric = StreamingClassification(logits.shape[1])
    metric.update(logits, labels)
    return metric.compute()


def plain(values):
    """Return the measures that are single numbers."""
    assert values["iou"] == []  # of images, not of pixels
    return {name: value for name, value in values.items() if name != "iou"}


@pytest.fixture
def stream():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(90, 7, generator=generator)
    labels = torch.randint(7, (90,), generator=generator)
    return logits, labels, torch.randint(4, (90,), generator=generator)


def test_interleaved_visits_are_measured_apart(stream):
    logits, labels, visits = stream
    metrics = VisitMetrics()
    for part in torch.arange(90).split(16):
        metrics.update(visits[part].tolist(), logits[part], labels[part])
    assert sorted(metrics.opened) == [0, 1, 2, 3]
    for visit in (2, 0, 3, 1):
        metrics.close(visit, counts=visit != 3)
        expected = of(logits[visits == visit], labels[visits == visit])
        assert plain(metrics.closed[visit]) == pytest.approx(plain(expected), nan_ok=True)
    assert list(metrics.closed) == [2, 0, 3, 1]
    assert plain(metrics.total()) == pytest.approx(plain(of(logits[visits != 3], labels[visits != 3])))


def test_total_is_pooled_and_no_mean(stream):
    """The calibration error of all images together is not the mean of the visits' own."""
    logits, labels, visits = stream
    metrics = VisitMetrics()
    metrics.update(visits.tolist(), logits, labels)
    assert metrics.total() is None
    for visit in range(4):
        metrics.close(visit)
    mean = sum(values["ece"] for values in metrics.closed.values()) / 4
    assert metrics.total()["ece"] == pytest.approx(of(logits, labels)["ece"])
    assert abs(metrics.total()["ece"] - mean) > 0.01


def test_a_closed_visit_keeps_no_tensor(stream):
    logits, labels, _ = stream
    metrics = VisitMetrics()
    for visit in range(50):
        metrics.update([visit] * 90, logits, labels)
        metrics.close(visit)
        assert metrics.opened == []
    assert not any(torch.is_tensor(value) for values in metrics.closed.values() for value in values.values())
    assert metrics.total()["samples"] == 50 * 90


def test_label_of_no_class_is_an_error_of_its_visit(stream):
    logits, labels, _ = stream
    metrics = VisitMetrics()
    metrics.update([0] * 90, logits, labels.clone().fill_(7))
    with pytest.raises(ValueError, match="saw label 7 with 7 classes"):
        metrics.close(0)
