"""Estimates of accuracy without labels. Each is as good as its assumptions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttalight.losses import entropy
from ttalight.models.network import Head
from ttalight.monitoring.signals import shannon

__all__ = ["agreement", "confidence_threshold", "dropout_predictions", "disagreement_accuracy", "thresholded_accuracy"]


def confidence_threshold(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative entropy below which as many source predictions lie as are wrong, a scalar.

    S. Garg, S. Balakrishnan, Z. C. Lipton, B. Neyshabur, H. Sedghi, *Leveraging Unlabeled Data to Predict
    Out-of-Distribution Performance*, ICLR 2022, arXiv 2201.04234 (average thresholded confidence, ATC-NE).

    Args:
        logits: Of source images that the model was not trained on, (N, C).
        labels: (N,).
    """
    wrong = (logits.argmax(1) != labels).sum()
    confidence = torch.cat([-entropy(logits), logits.new_full((1,), math.inf)])
    threshold: Tensor = confidence.sort().values[wrong]
    return threshold


def thresholded_accuracy(logits: Tensor, threshold: Tensor) -> Tensor:
    """Return the estimate of ATC: the share of predictions whose negative entropy is at least the threshold, a scalar.

    Args:
        logits: (B, C).
        threshold: Of ``confidence_threshold``.
    """
    return (-entropy(logits) >= threshold).double().mean()


def dropout_predictions(features: Tensor, head: Head, rate: float, samples: int, generator: torch.Generator) -> Tensor:
    """Return logits of the classifier behind drop-out of its input, (S, B, C).

    Args:
        features: (B, D).
        head: The classifier.
        rate: Share of features that are set to 0; the others are divided by 1 - rate.
        samples: Number of masks S for each image.
        generator: On the features' device.
    """
    keep = torch.empty(samples, *features.shape, device=features.device, dtype=features.dtype)
    keep.bernoulli_(1 - rate, generator=generator)
    logits = head.scale * (features * keep / (1 - rate)) @ head.weight.T
    return logits if head.bias is None else logits + head.bias


def disagreement_accuracy(logits: Tensor, dropped: Tensor, power: float = 3.0) -> Tensor:
    """Return the accuracy that disagreement under drop-out points to, a scalar.

    The error is estimated as the share of predictions that drop-out changes, divided by (E / ln C)^power, where E is
    the entropy of the mean prediction: a model that predicts few classes agrees with itself however wrong it is. It
    is cut off at chance, 1 - 1 / C.

    Args:
        logits: Predictions, (B, C).
        dropped: Those under drop-out, (S, B, C).
        power: Exponent, 3 in AETTA; 0 takes disagreement as it is.
    """
    classes = logits.shape[1]
    changed = (dropped.argmax(2) != logits.argmax(1)).double().mean()
    spread = shannon(dropped.double().softmax(2).mean((0, 1))) / math.log(classes)
    return 1 - (changed / spread.clamp_min(1e-6) ** power).clamp(0, 1 - 1 / classes)


def agreement(logits: Tensor, others: Tensor) -> Tensor:
    """Return the share of images that two members predict alike, a scalar.

    It is the accuracy of either in expectation if they are drawn alike and their ensemble is calibrated by class: Y.
    Jiang, V. Nagarajan, C. Baek, J. Z. Kolter, *Assessing Generalization of SGD via Disagreement*, ICLR 2022, arXiv
    2106.13799.

    Args:
        logits: (B, C).
        others: (B, C).
    """
    return (logits.argmax(1) == others.argmax(1)).double().mean()
