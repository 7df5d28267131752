from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from ttalight.metrics import StreamingClassification, functional
from ttalight.metrics.functional import (
    batch_sums,
    calibration_bins,
    classification_sums,
    diversity,
    expected_calibration_error,
    flatten_pixels,
)


def batch(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits[torch.arange(samples), labels] += 1.5
    return logits, labels


def slow_reference(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> dict[str, float]:
    """One sample after the other, in double precision."""
    correct, top5, nll, brier, entropy = 0, 0, 0.0, 0.0, 0.0
    predicted = [0] * logits.shape[1]
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        hit = int(order[0]) == label
        correct += hit
        top5 += label in order[:5]
        nll -= math.log(probabilities[label])
        brier += sum((p - (index == label)) ** 2 for index, p in enumerate(probabilities))
        predicted[int(order[0])] += 1
        entropy -= sum(p * math.log(p) for p in probabilities if p > 0)
        confidence = float(probabilities[order[0]])
        for index in range(bins):
            if index / bins < confidence <= (index + 1) / bins:
                members[index].append((confidence, hit))
    n = len(labels)
    ece = sum(
        len(m) / n * abs(sum(hit for _, hit in m) / len(m) - sum(conf for conf, _ in m) / len(m)) for m in members if m
    )
    accuracy = correct / n
    return {
        "samples": n,
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "top5": top5 / n,
        "nll": nll / n,
        "ece": ece,
        "brier": brier / n,
        "entropy": entropy / n,
        "diversity": -sum(k / n * math.log(k / n) for k in predicted if k) / math.log(len(predicted)),
        "miou": None,
        "iou": [],
    }


def compare(values, expected, **tolerance) -> None:
    """Numbers are close, and None is None."""
    assert values.keys() == expected.keys()
    for name, value in values.items():
        if expected[name] is None:
            assert value is None
        else:
            assert value == pytest.approx(expected[name], **tolerance), name


class TestStreamingClassification:
    @pytest.mark.parametrize(("samples", "classes"), [(1, 6), (257, 10), (100, 40)])
    def test_matches_a_slow_reference(self, samples, classes):
        logits, labels = batch(samples, classes)
        metric = StreamingClassification(classes)
        metric.update(logits, labels)
        compare(metric.compute(), slow_reference(logits, labels), abs=1e-6)

    def test_matches_torchmetrics(self):
        logits, labels = batch(500, 10, seed=1)
        metric = StreamingClassification(10)
        metric.update(logits, labels)
        values = metric.compute()
        assert values["accuracy"] == pytest.approx(MulticlassAccuracy(10, average="micro")(logits, labels).item())
        top5 = MulticlassAccuracy(10, average="micro", top_k=5)(logits, labels).item()
        assert values["top5"] == pytest.approx(top5)
        ece = MulticlassCalibrationError(10, n_bins=15, norm="l1")(logits, labels).item()
        assert values["ece"] == pytest.approx(ece, abs=1e-6)
        assert values["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)

    @pytest.mark.parametrize("size", [1, 7, 64, 300])
    def test_any_cut_into_batches_gives_the_same_numbers(self, size):
        logits, labels = batch(300, 12, seed=2)
        whole, parts = StreamingClassification(12), StreamingClassification(12)
        whole.update(logits, labels)
        for piece, target in zip(logits.split(size), labels.split(size), strict=True):
            parts.update(piece, target)
        compare(parts.compute(), whole.compute(), rel=1e-12)
        assert torch.equal(parts.predicted, whole.predicted)

    def test_log_probabilities_count_like_logits(self):
        logits, labels = batch(64, 8, seed=3)
        raw, normalised = StreamingClassification(8), StreamingClassification(8)
        raw.update(logits, labels)
        normalised.update(logits.log_softmax(dim=1), labels)
        compare(normalised.compute(), raw.compute(), abs=1e-6)

    def test_dense_predictions_count_every_pixel(self):
        logits, labels = batch(2 * 3 * 4, 7, seed=4)
        flat, dense = StreamingClassification(7), StreamingClassification(7)
        flat.update(logits, labels)
        dense.update(logits.view(2, 3, 4, 7).permute(0, 3, 1, 2), labels.view(2, 3, 4))
        assert dense.compute() == {**flat.compute(), **{name: dense.compute()[name] for name in ("miou", "iou")}}

    def test_mean_iou_by_hand(self):
        """Classes 0 and 2 of four pixels each, one pixel mistaken; class 1 does not occur and does not count."""
        labels = torch.tensor([[[0, 0], [0, 0]], [[2, 2], [2, 2]]])
        predictions = labels.clone()
        predictions[0, 0, 0] = 2
        metric = StreamingClassification(3)
        for image in range(2):  # counted over all images together, not averaged over them
            one_hot = torch.nn.functional.one_hot(predictions[image : image + 1], 3).float()
            metric.update(5 * one_hot.permute(0, 3, 1, 2), labels[image : image + 1])
        assert metric.compute()["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
        assert metric.compute()["iou"] == [3 / 4, None, 4 / 5]
        assert metric.compute()["accuracy"] == 7 / 8

    def test_ignored_pixels_leave_no_trace(self):
        logits, labels = batch(24, 7, seed=4)
        few, all_of_them = StreamingClassification(7), StreamingClassification(7, ignore_index=255)
        few.update(logits[:18].view(3, 6, 7).permute(0, 2, 1)[..., None], labels[:18].view(3, 6, 1))
        labels[18:] = 255
        all_of_them.update(logits.view(4, 6, 7).permute(0, 2, 1)[..., None], labels.view(4, 6, 1))
        assert all_of_them.compute() == few.compute()

    def test_an_ignored_class_of_the_network_is_no_region(self):
        """Class 2 of three is void: predicting it is an error of class 0, and no region of its own."""
        labels = torch.tensor([[[0, 0, 1, 2]]])
        metric = StreamingClassification(3, ignore_index=2)
        metric.update(torch.eye(3)[torch.tensor([[[0, 2, 1, 1]]])].movedim(-1, 1), labels)
        values = metric.compute()
        assert values["iou"] == [1 / 2, 1, None]
        assert (values["miou"], values["samples"]) == (3 / 4, 3)

    def test_blocks_of_pixels_add_up(self, monkeypatch):
        logits, labels = batch(2 * 6 * 5, 7)
        logits, labels = logits.view(2, 6, 5, 7).movedim(-1, 1), labels.view(2, 6, 5)
        whole = batch_sums(logits, labels, ignore_index=3)
        monkeypatch.setattr(functional, "_BLOCK_PIXELS", 14)  # 7 pixels of 2 images; the last block is shorter
        for name, value in batch_sums(logits, labels, ignore_index=3).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=0)

    @pytest.mark.parametrize(("classes", "expected"), [(2, None), (5, None), (6, 1.0)])
    def test_top5_is_null_where_it_would_always_be_one(self, classes, expected):
        metric = StreamingClassification(classes)
        metric.update(torch.eye(classes), torch.arange(classes))
        assert metric.compute()["top5"] == expected

    def test_masked_classes_count_as_classes_cut_off(self):
        logits, labels = batch(60, 7)
        cut, masked = StreamingClassification(7), StreamingClassification(10)
        cut.update(logits, labels)
        masked.update(torch.cat((logits, torch.full((60, 3), -math.inf)), 1), labels)
        expected, values = cut.compute(), masked.compute()
        for name in ("accuracy", "top5", "nll", "ece", "brier", "entropy"):
            assert values[name] == pytest.approx(expected[name]), name

    def test_a_masked_class_is_never_among_the_top5(self):
        logits = torch.full((1, 8), -math.inf)
        logits[0, 7] = 0.0
        for label in range(8):
            metric = StreamingClassification(8)
            metric.update(logits, torch.tensor([label]))
            values = metric.compute()
            assert values["top5"] == (label == 7)
            assert values["nll"] == (0.0 if label == 7 else math.inf)

    def test_memory_does_not_grow_with_the_stream(self):
        metric = StreamingClassification(10)
        sizes = []
        for seed in range(3):
            metric.update(*batch(200, 10, seed))
            sizes.append(sum(state.numel() for state in metric.metric_state.values()))
        assert sizes == [9 + 3 * 15 + 3 * 10] * 3

    def test_nothing_in_an_update_waits_for_the_device(self):
        """A meta tensor has no values: whatever reads one fails."""
        logits = torch.empty(4, 7, device="meta")
        labels = torch.empty(4, dtype=torch.int64, device="meta")
        metric = StreamingClassification(7).to("meta")
        metric.update(logits, labels)
        assert metric.nll.device.type == "meta"
        with pytest.raises((RuntimeError, NotImplementedError)):
            metric.compute()

    @pytest.mark.gpu
    def test_nothing_in_an_update_synchronises_cuda(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        logits, labels = (value.cuda() for value in batch(64, 10))
        metric = StreamingClassification(10).cuda()
        metric.update(logits, labels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            metric.update(logits, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert metric.compute()["samples"] == 128

    def test_inference_mode_state_updates_outside(self):
        logits, labels = batch(32, 10)
        with torch.inference_mode():
            metric = StreamingClassification(10)
            metric.update(logits, labels)
        metric.update(logits.requires_grad_(), labels)
        assert metric.compute()["samples"] == 64
        assert not metric.nll.requires_grad

    def test_reset_starts_the_next_visit_afresh(self):
        metric, fresh = StreamingClassification(10), StreamingClassification(10)
        metric.update(*batch(50, 10, seed=5))
        metric.compute()
        metric.reset()
        for one in (metric, fresh):
            one.update(*batch(20, 10, seed=6))
        assert metric.compute() == fresh.compute()

    @pytest.mark.parametrize(("label", "message"), [(10, "saw label 10 with 10 classes"), (-1, "saw label -1")])
    def test_label_outside_the_classes_is_reported(self, label, message):
        logits, labels = batch(8, 10)
        labels[3] = label
        metric = StreamingClassification(10)
        metric.update(logits, labels)
        metric.update(*batch(8, 10, seed=1))
        with pytest.raises(ValueError, match=message + r".*\[0, 9\]"):
            metric.compute()

    def test_nan_logits_show_in_nll_and_ece(self):
        logits, labels = batch(8, 10)
        logits[0] = float("nan")
        metric = StreamingClassification(10)
        metric.update(logits, labels)
        values = metric.compute()
        assert math.isnan(values["nll"])
        assert math.isnan(values["ece"])
        assert 0 <= values["accuracy"] <= 1

    def test_zero_probability_has_no_entropy(self):
        logits = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
        metric = StreamingClassification(2)
        metric.update(logits, torch.tensor([0, 1]))
        assert metric.compute()["entropy"] == pytest.approx(math.log(2) / 2)

    def test_half_precision_is_summed_in_double(self):
        logits = torch.zeros(5000, 10, dtype=torch.bfloat16)
        metric = StreamingClassification(10)
        metric.update(logits, torch.zeros(5000, dtype=torch.int64))
        values = metric.compute()
        assert values["nll"] == pytest.approx(math.log(10), rel=1e-6)
        assert values["accuracy"] == 1.0
        assert values["error"] == 0.0

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_no_samples_is_nan_and_not_zero(self):
        values = StreamingClassification(10).compute()
        assert values["samples"] == 0
        assert all(math.isnan(values[name]) for name in ("accuracy", "error", "nll", "ece", "brier", "diversity"))

    def test_collapse_shows_in_the_diversity(self):
        metric = StreamingClassification(4)
        metric.update(torch.eye(4), torch.arange(4))
        assert metric.compute()["diversity"] == pytest.approx(1.0)
        metric.reset()
        metric.update(torch.eye(4)[[2, 2, 2]], torch.arange(3))
        assert metric.compute()["diversity"] == 0.0
        assert metric.predicted.tolist() == [0, 0, 3, 0]

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="num_classes must be >= 2, got 1"):
            StreamingClassification(1)
        with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
            StreamingClassification(2, bins=0)
        with pytest.raises(ValueError, match="logits of 4 classes, expected 3"):
            StreamingClassification(3).update(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


class TestFunctional:
    @pytest.mark.parametrize("shape", [(2,), (3,), (2, 4), (2, 5, 4)])
    def test_shapes_that_do_not_belong_together(self, shape):
        logits = torch.zeros(2, 3, 4, 5) if len(shape) > 1 else torch.zeros(4, 3)
        with pytest.raises(ValueError, match="do not belong together"):
            flatten_pixels(logits, torch.zeros(shape, dtype=torch.int64))

    def test_wrong_types(self):
        with pytest.raises(TypeError, match=r"logits must be floating point, got torch[.]int64"):
            flatten_pixels(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"labels must be integers, got torch[.]float32"):
            flatten_pixels(torch.zeros(2, 3), torch.zeros(2))

    def test_labels_of_any_integer_type(self):
        _, labels = flatten_pixels(torch.zeros(2, 3), torch.tensor([1, 2], dtype=torch.uint8))
        assert labels.dtype == torch.int64

    def test_bins_are_closed_above(self):
        confidences = torch.tensor([0.2, 0.2 + 1e-9, 0.4, 1.0], dtype=torch.float64)
        count, confidence, hits = calibration_bins(confidences, torch.tensor([True, False, True, True]), bins=5)
        assert count.tolist() == [1, 2, 0, 0, 1]
        assert confidence.tolist() == pytest.approx([0.2, 0.6, 0, 0, 1])
        assert hits.tolist() == [1, 1, 0, 0, 1]

    def test_calibration_error_by_hand(self):
        # Bin 1: confidence 0.6 against accuracy 0.5; bin 2: confidence 0.9 against accuracy 1; weights 2/3 and 1/3.
        ece = expected_calibration_error(torch.tensor([2, 1]), torch.tensor([1.2, 0.9]), torch.tensor([1, 1]))
        assert ece.item() == pytest.approx(2 / 3 * 0.1 + 1 / 3 * 0.1)

    def test_sums_of_parts_add_up_to_the_sum_of_the_whole(self):
        logits, labels = batch(90, 9)
        whole = classification_sums(logits, labels)
        parts = [classification_sums(a, b) for a, b in zip(logits.split(40), labels.split(40), strict=True)]
        for name, value in whole.items():
            if not name.endswith("_label"):
                torch.testing.assert_close(sum(part[name] for part in parts), value)

    def test_diversity_by_hand(self):
        shares = np.array([0.5, 0.25, 0.25])
        expected = -(shares * np.log(shares)).sum() / np.log(3)
        assert diversity(torch.tensor([2, 1, 1])).item() == pytest.approx(expected)
