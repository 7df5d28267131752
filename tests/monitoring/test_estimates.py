"""Estimates of accuracy without labels."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.adapters import PTBN, Source, Tent
from ttalight.models.network import Head
from ttalight.monitoring import DropoutDisagreement, Estimate, MemberAgreement, ThresholdedConfidence
from ttalight.monitoring.estimates import (
    agreement,
    confidence_threshold,
    disagreement_accuracy,
    dropout_predictions,
    thresholded_accuracy,
)

ESTIMATORS = {
    "atc": lambda images, labels: ThresholdedConfidence(images, labels, batch_size=64),
    "dropout": lambda images, labels: DropoutDisagreement(),
    "agreement": lambda images, labels: MemberAgreement(),
}


@pytest.fixture
def labelled(stream, net):
    images = torch.cat(stream[8:])
    with torch.no_grad():
        logits = net(images)
    return images, torch.where(torch.arange(len(images)) % 5 == 0, logits.argmin(1), logits.argmax(1))


def test_estimate_of_the_calibration_images_is_their_accuracy():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(300, 5, dtype=torch.float64), torch.randint(5, (300,))
    threshold = confidence_threshold(logits, labels)
    accuracy = (logits.argmax(1) == labels).double().mean()
    assert thresholded_accuracy(logits, threshold) == accuracy
    assert thresholded_accuracy(logits * 10, threshold) > accuracy


def test_model_that_is_always_wrong_gets_an_estimate_of_zero():
    logits = torch.randn(20, 3)
    assert thresholded_accuracy(logits, confidence_threshold(logits, logits.argmin(1))) == 0


def test_dropout_drops_and_scales():
    head = Head(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), 2.0)
    features = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    logits = dropout_predictions(features, head, 0.75, 4000, torch.Generator().manual_seed(0))
    assert logits.shape == (4000, 1, 3)
    assert set(logits[:, 0, 1].tolist()) == {1.0, 2 * 2.0 / 0.25 + 1}
    assert torch.allclose(logits.mean(0), 2 * features + 1, rtol=0.1)


def test_disagreement_against_its_formula():
    torch.manual_seed(0)
    logits, dropped = torch.randn(50, 4, dtype=torch.float64), torch.randn(6, 50, 4, dtype=torch.float64)
    dropped += 2 * logits
    changed = sum(
        int(sample.argmax()) != int(row.argmax()) for part in dropped for sample, row in zip(part, logits, strict=True)
    )
    mean = sum(sample.softmax(0) for part in dropped for sample in part) / 300
    spread = -sum(float(p) * math.log(float(p)) for p in mean) / math.log(4)
    assert disagreement_accuracy(logits, dropped).item() == pytest.approx(1 - changed / 300 / spread**3)
    assert disagreement_accuracy(logits, dropped, 0.0).item() == pytest.approx(1 - changed / 300)


def test_model_of_one_class_is_no_better_than_chance():
    logits = torch.tensor([[30.0, 0, 0, 0]]).repeat(50, 1)
    dropped = logits.repeat(6, 1, 1)
    dropped[0, 0] = torch.tensor([0.0, 1, 0, 0])  # a single change is enough
    assert disagreement_accuracy(logits, dropped).item() == pytest.approx(0.25)


def test_agreement_counts_equal_predictions():
    assert agreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]) == 0.5


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_change_nothing_and_mark_what_they_say(name, make_net, stream, labelled):
    estimator = ESTIMATORS[name](*labelled)
    adapted, twin = Tent(lr=0.01).wrap(make_net()).watch(estimator), Tent(lr=0.01).wrap(make_net())
    for images in stream[:4]:
        assert torch.equal(adapted(images), twin(images))
    assert all(map(torch.equal, adapted.state_dict()["tensors"].values(), twin.state_dict()["tensors"].values()))
    assert adapted.engine.net.forwards == twin.engine.net.forwards
    assert [estimate.batch for estimate in estimator.estimates] == [1, 2, 3]
    assert all(0 <= estimate.accuracy <= 1 for estimate in estimator.estimates)
    assert repr(estimator.estimates[0]).startswith("estimated accuracy ")
    assert list(estimator.curves()) == [f"estimated_accuracy/{name}"]


def test_thresholded_confidence_of_the_source_model(net, labelled):
    images, labels = labelled
    estimator = ThresholdedConfidence(images, labels)
    adapted = Source().wrap(net).watch(estimator)
    adapted(images)
    adapted(images)
    assert estimator.accuracy == pytest.approx(0.8, abs=0.01)


def test_source_agrees_with_itself_and_members_are_asked(net, make_net, stream):
    alone, other = MemberAgreement(), MemberAgreement(lambda images: torch.zeros(len(images), 4).double())
    adapted = Source().wrap(net).watch(alone, other)
    first = adapted(stream[0])
    adapted(stream[1])
    assert alone.estimates == [Estimate("agreement", 1, 32, 1.0)]
    assert other.estimates[0].accuracy == (first.argmax(1) == 0).double().mean()


def test_run_logs_estimates(net, run, labelled):
    rows = run(net, PTBN(), ThresholdedConfidence(*labelled), DropoutDisagreement())
    names = {name for row in rows for name in row}
    assert {"estimated_accuracy/atc", "estimated_accuracy/dropout"} <= names
    assert not any("accuracy" in name and "estimated" not in name for name in names)


def test_odd_arguments_are_refused():
    with pytest.raises(ValueError, match="a label for each image"):
        ThresholdedConfidence(torch.rand(2, 3, 4, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="rate must be"):
        DropoutDisagreement(rate=1.0)
    with pytest.raises(ValueError, match="momentum must be"):
        DropoutDisagreement(momentum=0.0)
    with pytest.raises(TypeError, match="member must be a network"):
        MemberAgreement("resnet")
