"""STAG: entropy gradients in closed form, aligned with anchors that the classifier's geometry gives."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ttalight.adapters.term import Term
from ttalight.losses.structural import (
    entropy_slopes,
    predicted_slopes,
    structural_alignment,
    structural_anchors,
    structural_logits,
)
from ttalight.models.network import Head, Outputs

__all__ = ["STAG"]


class STAG(Term):
    """Adds, for each sample, one minus the cosine between its entropy gradient and the anchor of its predicted class.

    Row k of the classifier, taken for a feature, has an entropy; the gradient of that entropy is the anchor of class k.
    The gradient of a sample's entropy follows from its logits and the classifier alone, so there is no backward but
    the method's own: two products of (B, C) by (C, D) a batch. Dense outputs, (B, C, H, W), count per pixel and are
    averaged over an image. Add it to any method: ``Tent(terms=[STAG()], clip_norm=1.0)``.

    Saturated and undecided predictions have almost no gradient, and the derivative of a cosine grows with one over its
    length: give the method ``clip_norm=1.0``.

    This is a **reconstruction**: J. Shin, Y. Oh, J. Lee, S. Lee, M. Park, D. Lee, U. Hwang, S. Yoon, *STAG: Structural
    Test-time Alignment of Gradients for Online Adaptation*, arXiv 2402.09004 (version 2), was available to us as an
    abstract and captions of figures, without code. What they fix: anchors from a self-structural entropy of classifier
    weights, the entropy gradient of the predicted class in closed form, a cosine loss, no further backward. What they
    leave open, and is derived here, is an option: the space of the gradient, whose entropy, the length and the bias of
    the rows as features, and the weight. Anchors are made anew for the classes that a batch predicts, which costs as
    much as the classifier itself and needs neither memory nor state.

    Args:
        weight: Factor of the term; 0.3 to 1 is sensible beside a mean entropy.
        space: Where gradients live: ``feature`` (the derivative by the feature), ``total`` (the anchor's derivative by
            row k as a feature and as a row of the classifier) or ``weight_row`` (the derivative by the predicted
            class's row, where the cosine becomes that of feature and row).
        objective: ``entropy`` of all classes, or the ``predicted`` class's share -p log p alone, whose gradient turns
            round where p = 1/e.
        anchor_norm: Length of the rows as features: ``none`` for their own, ``match`` for the mean length of the
            batch's features.
        anchor_bias: Whether the classifier's bias takes part in the anchors; it always does in the samples' gradients.
        smallest: Gradients shorter than this are left out.
        reweight: See ``Term``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if there is only one class, or if
            ``weight_row`` meets logits of another resolution than the classifier's.
    """

    def __init__(
        self,
        weight: float = 0.3,
        space: Literal["feature", "total", "weight_row"] = "feature",
        objective: Literal["entropy", "predicted"] = "entropy",
        anchor_norm: Literal["none", "match"] = "none",
        anchor_bias: bool = False,
        smallest: float = 1e-6,
        reweight: bool = False,
    ) -> None:
        super().__init__(weight=weight, reweight=reweight)
        if space not in ("feature", "total", "weight_row"):
            raise ValueError(f"space must be 'feature', 'total' or 'weight_row', got {space!r}")
        if objective not in ("entropy", "predicted"):
            raise ValueError(f"objective must be 'entropy' or 'predicted', got {objective!r}")
        if anchor_norm not in ("none", "match"):
            raise ValueError(f"anchor_norm must be 'none' or 'match', got {anchor_norm!r}")
        if not smallest > 0:
            raise ValueError(f"smallest must be positive, got {smallest}")
        self.space, self.objective = space, objective
        self.anchor_norm, self.anchor_bias = anchor_norm, anchor_bias
        self.smallest = smallest

    def __call__(self, outputs: Outputs, head: Head, selected: Tensor | None) -> Tensor:
        """Return the misalignment of every sample, (B,), in [0, 2]."""
        assert outputs.features is not None, "a method with terms asks for the head, so that features are kept"
        if outputs.logits.shape[1] < 2:
            raise ValueError("STAG needs two classes or more: with one the entropy is constant")
        logits, features = _rows(outputs.logits), _rows(outputs.features, like=outputs.logits)
        weight = (head.scale * head.weight).to(logits.dtype)
        classes = logits.detach().argmax(1)
        slopes = self._slopes(logits, classes)
        if self.space == "weight_row":
            if len(features) != len(slopes):
                raise ValueError(
                    f"space='weight_row' pairs each of {len(slopes)} predictions with its feature, got {len(features)} "
                    "features: the network resizes its logits; use space='feature' or 'total'"
                )
            gradients = slopes.gather(1, classes[:, None]) * features
        else:
            gradients = slopes @ weight
        masked = (logits.detach() == -torch.inf).all(0)
        anchors = self._anchors(classes, features.detach(), weight, head.bias, masked)
        values = structural_alignment(gradients, anchors, self.smallest)
        return values.view(len(outputs.logits), -1).mean(1)

    def _slopes(self, logits: Tensor, classes: Tensor) -> Tensor:
        return entropy_slopes(logits) if self.objective == "entropy" else predicted_slopes(logits, classes)

    @torch.no_grad()
    def _anchors(
        self, predicted: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, masked: Tensor
    ) -> Tensor:
        """Return the anchor of each predicted class, (N, D), in a classifier without the masked classes."""
        few = len(predicted) < len(weight)
        classes = predicted if few else torch.arange(len(weight), device=weight.device)
        rows = weight[classes]
        if self.anchor_norm == "match":
            length = torch.linalg.vector_norm(features, dim=1).mean()
            rows = torch.nn.functional.normalize(rows, dim=1) * length
        logits = structural_logits(rows, weight, bias if self.anchor_bias else None).masked_fill(masked, -torch.inf)
        anchors = structural_anchors(self._slopes(logits, classes), classes, rows, weight, self.space)
        return anchors if few else anchors[predicted]


def _rows(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return one row a prediction: (B, C) or (B, C, H, W) to (N, C)."""
    if (tensor if like is None else like).ndim == 2:
        return tensor.flatten(1)
    return tensor.movedim(1, -1).flatten(0, -2)
