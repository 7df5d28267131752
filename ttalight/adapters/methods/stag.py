"""STAG: entropy gradients in closed form, aligned with anchors that the classifier's geometry gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.adapters.term import Term
from ttalight.errors import InputError
from ttalight.losses.structural import entropy_slopes, structural_alignment
from ttalight.models.network import Head, Outputs
from ttalight.models.outputs import possible_classes

__all__ = ["STAG"]


class STAG(Term):
    """Adds, for each sample, one minus the cosine between its entropy gradient and the anchor of its predicted class.

    Row k of the classifier, taken for a feature, has an entropy; the gradient of that entropy is the anchor of class k.
    The gradient of a sample's entropy follows from its logits and the classifier alone, so there is no backward but
    the method's own: two products of (B, C) by (C, D) a batch. Dense outputs, (B, C, H, W), count per pixel and are
    averaged over an image. Add it to any method: ``Tent(terms=[STAG()], clip_norm=1.0)``.

    Saturated and undecided predictions have almost no gradient, and the derivative of a cosine grows with one over its
    length: gradients shorter than 1e-6 are left out, and the method needs ``clip_norm=1.0``.

    This is a **reconstruction**: J. Shin, Y. Oh, J. Lee, S. Lee, M. Park, D. Lee, U. Hwang, S. Yoon, *STAG: Structural
    Test-time Alignment of Gradients for Online Adaptation*, arXiv 2402.09004 (version 2), was available to us as an
    abstract and captions of figures, without code. What they fix: anchors from a self-structural entropy of classifier
    weights, the entropy gradient of the predicted class in closed form, a cosine loss, no further backward. What they
    leave open was chosen here: gradients are by the feature, of the entropy of all classes, rows are features of their
    own length, the classifier's bias takes part in the samples' gradients and not in the anchors. Each batch computes
    the anchors of the classes that it predicts, which costs as much as the classifier and needs no state.

    Args:
        weight: Factor of the term; 0.3 to 1 is sensible beside a mean entropy.
        reweight: See ``Term``.

    Raises:
        ValueError: At the first batch, if there is only one class.
    """

    def __init__(self, weight: float = 0.3, reweight: bool = False) -> None:
        super().__init__(weight=weight, reweight=reweight)

    def __call__(self, outputs: Outputs, head: Head, selected: Tensor | None) -> Tensor:
        """Return the misalignment of every sample, (B,), in [0, 2]."""
        if outputs.logits.shape[1] < 2:
            raise InputError("STAG needs two classes or more: with one the entropy is constant")
        logits = _rows(outputs.logits)
        weight = (head.scale * head.weight).to(logits.dtype)
        masked = ~possible_classes(logits)
        anchors = _anchors(logits.detach().argmax(1), weight, masked)
        values = structural_alignment(entropy_slopes(logits) @ weight, anchors)
        return values.view(len(outputs.logits), -1).mean(1)


@torch.no_grad()
def _anchors(predicted: Tensor, weight: Tensor, masked: Tensor) -> Tensor:
    """Return the anchor of each predicted class, (N, D), in a classifier without the masked classes."""
    few = len(predicted) < len(weight)
    rows = weight[predicted] if few else weight
    anchors = entropy_slopes((rows @ weight.T).masked_fill(masked, -torch.inf)) @ weight
    return anchors if few else anchors[predicted]


def _rows(logits: Tensor) -> Tensor:
    """Return one row a prediction: (B, C) or (B, C, H, W) to (N, C)."""
    return logits.movedim(1, -1).flatten(0, -2)
