"""The sums over samples that classification metrics are made of, and the metrics made from sums.

Everything here works on tensors of any device and reads no value back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ttalight.errors import InputError, InputTypeError
from ttalight.labels import UNLABELLED

TOP_K = 5

#: Pixels of a dense prediction whose probabilities are in memory at once.
_BLOCK_PIXELS = 2**18


def batch_sums(logits: Tensor, labels: Tensor, bins: int = 15, ignore_index: int | None = None) -> dict[str, Tensor]:
    """Sum over a batch of images or of dense predictions what classification metrics need.

    Dense predictions are summed up in blocks of pixels, so that the memory beside the logits is bounded.

    Args:
        logits: (B, C), or (B, C, *) with any further dimensions; floating point.
        labels: (B,), or (B, *); integers.
        bins: Number of equal-width bins of confidence.
        ignore_index: Label of samples that do not count; picking them out waits for the device.

    Returns:
        See :func:`classification_sums`.

    Raises:
        TypeError: If the logits are not floating point or the labels not integers.
        ValueError: If the shapes do not belong together.
    """
    _check_shapes(logits, labels)
    if logits.ndim == 2:
        return _counted_sums(logits, labels, bins, ignore_index)
    pixels, targets = logits.flatten(2), labels.flatten(1)
    block = max(1, _BLOCK_PIXELS // max(1, len(logits)))
    total = _counted_sums(pixels[..., :block], targets[:, :block], bins, ignore_index)
    for start in range(block, pixels.shape[2], block):
        part = slice(start, start + block)
        total = add_sums(total, _counted_sums(pixels[..., part], targets[:, part], bins, ignore_index))
    return total


def _counted_sums(logits: Tensor, labels: Tensor, bins: int, ignore_index: int | None) -> dict[str, Tensor]:
    """Return the sums of the samples whose label counts."""
    logits, labels = flatten_pixels(logits, labels)
    if ignore_index is not None:
        counts = labels != ignore_index
        logits, labels = logits[counts], labels[counts]
    return classification_sums(logits, labels, bins)


def flatten_pixels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Make one row of every sample: an image, or a pixel of a dense prediction.

    Args:
        logits: (B, C), or (B, C, *) with any further dimensions; floating point.
        labels: (B,), or (B, *); integers.

    Returns:
        Logits (N, C) and labels (N,) int64, N = B times the size of the further dimensions.

    Raises:
        TypeError: If the logits are not floating point or the labels not integers.
        ValueError: If the shapes do not belong together.
    """
    _check_shapes(logits, labels)
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]), labels.reshape(-1).long()


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point():
        raise InputTypeError(
            f"logits must be floating point, got {logits.dtype}: give scores of classes, not predictions"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputTypeError(f"labels must be integers, got {labels.dtype}: give the index of the class")
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise InputError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not belong together: "
            "expected (B, C) with (B,), or (B, C, *) with (B, *)"
        )


def classification_sums(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Tensor]:
    """Sum over a batch what classification metrics need; the sums of batches add up to those of their union.

    A log-probability is its own log-softmax, so ``logits`` may hold log-probabilities as well. Non-finite rows make
    the sums they enter non-finite instead of vanishing. A label outside [0, C) counts as an error of the nearest
    class and shows in ``lowest_label`` or ``highest_label``, which are the only entries that do not add up.
    Samples with the label ``UNLABELLED`` are counted in ``unlabelled``, and show in neither.

    Args:
        logits: (N, C), any floating type; half precision is raised to float32.
        labels: (N,) int64.
        bins: Number of equal-width bins of confidence.

    Returns:
        Counts in int64 and sums in float64 on the device of the logits: ``samples``, ``unlabelled``, ``correct``,
        ``top5_correct`` (of the min(5, C) highest), ``nll`` and ``entropy`` in nats and ``brier`` as scalars;
        ``bin_count``, ``bin_confidence`` and ``bin_correct`` of shape (bins,); ``predicted``, ``labelled`` and
        ``hits`` (C,), how often each class was predicted, was the label, was both; ``lowest_label`` and
        ``highest_label``, bounded by 0 from above and from below.
    """
    rows, classes = logits.shape
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    probs = log_probs.exp()
    predictions = log_probs.argmax(dim=1)
    correct = predictions == labels
    nearest = labels.clamp(0, classes - 1)
    own_class = nearest.unsqueeze(1)
    confidences = probs.amax(dim=1)
    no_class = labels.new_zeros(classes)
    highest = log_probs.topk(min(TOP_K, classes), dim=1)
    without = labels == UNLABELLED
    ends = torch.cat((labels.masked_fill(without, 0), labels.new_zeros(1)))
    count, confidence, hits = calibration_bins(confidences, correct, bins)
    return {
        "samples": labels.new_full((), rows),
        "unlabelled": without.sum(),
        "correct": correct.sum(),
        "top5_correct": ((highest.indices == labels.unsqueeze(1)) & (highest.values != -math.inf)).sum(),
        "nll": -log_probs.gather(1, own_class).sum(dtype=torch.float64),
        "brier": (probs.square().sum(dim=1) - 2 * probs.gather(1, own_class).squeeze(1) + 1).sum(dtype=torch.float64),
        "entropy": torch.special.entr(probs).sum(dtype=torch.float64),
        "bin_count": count,
        "bin_confidence": confidence,
        "bin_correct": hits,
        "predicted": no_class.scatter_add(0, predictions, torch.ones_like(predictions)),
        "labelled": no_class.scatter_add(0, nearest, torch.ones_like(nearest)),
        "hits": no_class.scatter_add(0, nearest, correct.long()),
        "lowest_label": ends.amin(),
        "highest_label": ends.amax(),
    }


def add_sums(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Combine the sums of two batches into those of their union.

    Args:
        left: What :func:`classification_sums` returned for one.
        right: And for the other, on the same device.

    Returns:
        New tensors under the same names.
    """
    ends = {"lowest_label": torch.minimum, "highest_label": torch.maximum}
    return {name: ends.get(name, torch.add)(left[name], right[name]) for name in left}


def calibration_bins(confidences: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Sort predictions by confidence into equal-width bins, open below and closed above.

    Args:
        confidences: (N,), probability of the predicted class in [0, 1].
        correct: (N,) bool.
        bins: Number of bins.

    Returns:
        Number of predictions int64, sum of confidences float64 and number of correct predictions int64, each (bins,).
    """
    values = confidences.double()
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=values.device)[1:-1]
    index = torch.bucketize(values, inner)
    zeros = torch.zeros(bins, dtype=torch.int64, device=values.device)
    return (
        zeros.scatter_add(0, index, torch.ones_like(index)),
        zeros.double().scatter_add(0, index, values),
        zeros.scatter_add(0, index, correct.long()),
    )


def expected_calibration_error(count: Tensor, confidence: Tensor, correct: Tensor) -> Tensor:
    """Distance of confidence from accuracy, averaged over bins by their number of samples.

    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599. Bins are
    (low, high] as in the paper; torchmetrics has [low, high) and a bin of its own for a confidence of exactly 1.

    Args:
        count: (bins,), number of samples.
        confidence: (bins,), sum of confidences.
        correct: (bins,), number of correct predictions.

    Returns:
        Scalar float64 in [0, 1]; NaN without samples.
    """
    # With a bin's weight count / N its own count cancels: no bin is divided by, so empty ones need no care.
    return (confidence.double() - correct).abs().sum() / count.sum()


def class_iou(predicted: Tensor, labelled: Tensor, hits: Tensor, ignore_index: int | None = None) -> Tensor:
    """Intersection over union of predicted and true regions of each class.

    Everingham, Van Gool, Williams, Winn, Zisserman, "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010:
    hits / (hits + false positives + false negatives) of a class, counted over all images together.

    Args:
        predicted: (C,), how often each class was predicted.
        labelled: (C,), how often it was the label.
        hits: (C,), how often it was both.
        ignore_index: Label of samples that do not count. A class of this index has no region, even if it is predicted.

    Returns:
        (C,) float64 in [0, 1]; NaN for classes that neither were predicted nor are a label. The mean intersection over
        union is the mean of the others.
    """
    union = predicted + labelled - hits
    values = hits.double() / union
    if ignore_index is not None and 0 <= ignore_index < len(values):
        values[ignore_index] = torch.nan
    return values


def diversity(predicted: Tensor) -> Tensor:
    """Entropy of the predicted classes over its maximum log C: 1 for equal shares, 0 for a collapse to one class.

    Args:
        predicted: (C,), how often each class was predicted; C >= 2.

    Returns:
        Scalar float64 in [0, 1]; NaN without predictions.
    """
    shares = predicted.double() / predicted.sum()
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy / math.log(len(predicted))
